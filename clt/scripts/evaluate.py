"""Error, explained variance, L0 and dead features of a trained transcoder on held-out activations.

clt evaluate --clt runs/gpt2 --data activations/gpt2/pile_train/held_out
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from clt.config import InferenceConfig
from clt.config.base import write_text_atomically
from clt.data.stores import LocalActivationStore
from clt.errors import ConfigError
from clt.models import CrossLayerTranscoder
from clt.scripts.plans import transcoder_line
from clt.training.evaluator import Evaluation, evaluate
from clt.types import choose_device
from clt.viz.training_plots import density_per_layer, error_by_distance, per_layer, save


@dataclass(frozen=True, kw_only=True)
class Options(InferenceConfig):
    """A transcoder, held-out activations, and where to put the numbers."""

    output: str | None = None
    """JSON file for the result; None: `evaluation.json` in the output folder."""
    by_distance: bool = True
    """Also measure the error when only sources near their target are used."""
    plots: bool = True
    """Draw EV, L0, density and error by distance as PNG files in `evaluation/` of the output folder."""
    json: bool = False
    """Print the result as JSON instead of a table."""


def held_out_folder(data: str) -> Path:
    """The folder itself, or its `held_out` if the folder above both splits was given."""
    root = Path(data)
    return root / "held_out" if (root / "held_out").is_dir() else root


def evaluate_folder(options: InferenceConfig) -> Evaluation:
    """Every held-out token once (or the first `max_eval_batches` batches)."""
    device = choose_device(options.device)
    model = CrossLayerTranscoder.from_pretrained(options.clt_checkpoint_path, device)
    store = LocalActivationStore(
        held_out_folder(options.data_path),
        batch_size_tokens=options.eval_batch_size_tokens,
        dtype=getattr(torch, options.activation_dtype),
    )
    ours, data = (model.config.num_layers, model.config.d_model), (store.n_layers, store.d_model)
    if ours != data:
        raise ConfigError(
            f"{options.clt_checkpoint_path} has (layers, d_model) = {ours}, the activations in {options.data_path} "
            f"{data}. They belong to different hosts."
        )
    by_distance = isinstance(options, Options) and options.by_distance
    return evaluate(model, islice(store.one_pass(), options.max_eval_batches), by_distance)


def table(result: Evaluation) -> Table:
    """One row per layer, one for all."""
    kinds = list(result.nmse_per_kind)
    view = Table(title=f"{result.n_tokens:,} held-out tokens, {result.features_per_layer} features per layer")
    for column in ("layer", "NMSE", "EV", "L0", "dead", *(f"NMSE {kind}" for kind in kinds)):
        view.add_column(column, justify="right")
    for layer, nmse in enumerate(result.nmse_per_layer):
        view.add_row(
            str(layer),
            f"{nmse:.4f}",
            f"{1 - nmse:.4f}",
            f"{result.l0_per_layer[layer]:.1f}",
            str(result.dead_per_layer[layer]),
            *(f"{result.nmse_per_kind[kind][layer]:.4f}" for kind in kinds),
        )
    view.add_section()
    means = (sum(result.nmse_per_kind[kind]) / len(result.nmse_per_layer) for kind in kinds)
    dead = f"{result.dead_share:.2%}"
    view.add_row(
        "all", f"{result.nmse:.4f}", f"{result.explained_variance:.4f}", f"{result.l0:.1f}", dead,
        *(f"{mean:.4f}" for mean in means),
    )  # fmt: skip
    return view


def distance_table(result: Evaluation) -> Table:
    """NMSE per layer by farthest source used."""
    view = Table(title="NMSE when only sources up to a distance are used")
    for column in ("distance", *(f"layer {layer}" for layer in range(len(result.nmse_per_layer))), "mean"):
        view.add_column(column, justify="right")
    for distance, values in result.nmse_within_distance.items():
        mean = sum(values) / len(values)
        view.add_row(distance, *(f"{value:.3f}" for value in values), f"{mean:.4f}")
    return view


def draw(result: Evaluation, folder: Path) -> list[Path]:
    """The figures of an evaluation as files."""
    kinds = result.nmse_per_kind if len(result.nmse_per_kind) > 1 else {}
    explained = {name: [1 - value for value in values] for name, values in kinds.items()}
    figures = {
        "explained_variance": per_layer(
            [1 - value for value in result.nmse_per_layer], "explained variance", explained
        ),
        "l0": per_layer(result.l0_per_layer, "active features per token"),
        "density": density_per_layer(result.density.numpy()),
    }
    if result.nmse_within_distance:
        figures["error_by_distance"] = error_by_distance(result.nmse_within_distance)
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def plan(options: Options) -> dict[str, Any]:
    """What would be read and written."""
    line = transcoder_line(options.clt_checkpoint_path)
    store = LocalActivationStore(held_out_folder(options.data_path))
    folder, output = places(options)
    return {
        "read": [line, f"{held_out_folder(options.data_path)}: {store.total_tokens:,} tokens"],
        "write": [str(output), *([f"{folder / 'evaluation'}/*.png"] if options.plots else [])],
    }


def places(options: Options) -> tuple[Path, Path]:
    """The folder of the figures, and the JSON file."""
    folder = Path(options.output_log_dir or options.clt_checkpoint_path)
    return folder, Path(options.output or folder / "evaluation.json")


def main(options: Options) -> None:
    """Evaluate, write the JSON and the figures, print it or a table."""
    result = evaluate_folder(options)
    folder, output = places(options)
    text = json.dumps({"options": options.to_dict(), **result.to_dict()}, indent=2)
    write_text_atomically(output, text + "\n")
    if options.plots:
        draw(result, folder / "evaluation")
    if options.json:
        print(text)
        return
    console = Console()
    console.print(table(result))
    if result.nmse_within_distance:
        console.print(distance_table(result))
    if options.plots:
        console.print(f"Figures in {folder / 'evaluation'}.")
