"""Error, explained variance, L0 and dead features of a trained transcoder on held-out activations.

clt evaluate --clt runs/gpt2 --data activations/gpt2/pile_train/held_out
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from clt.config import InferenceConfig
from clt.config.base import write_text_atomically
from clt.data.stores import LocalActivationStore
from clt.errors import ConfigError
from clt.models import CrossLayerTranscoder
from clt.training.evaluator import Evaluation, evaluate


@dataclass(frozen=True, kw_only=True)
class Options(InferenceConfig):
    """A transcoder, held-out activations, and where to put the numbers."""

    output: str | None = None
    """JSON file for the result; None: `evaluation.json` beside the transcoder."""
    json: bool = False
    """Print the result as JSON instead of a table."""


def held_out_folder(data: str) -> Path:
    """The folder itself, or its `held_out` if the folder above both splits was given."""
    root = Path(data)
    return root / "held_out" if (root / "held_out").is_dir() else root


def evaluate_folder(options: InferenceConfig) -> Evaluation:
    """Every held-out token once (or the first `max_eval_batches` batches)."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
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
    return evaluate(model, islice(store.one_pass(), options.max_eval_batches))


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


def main(options: Options) -> None:
    """Evaluate, write the JSON, print it or a table."""
    result = evaluate_folder(options)
    text = json.dumps(result.to_dict(), indent=2)
    write_text_atomically(Path(options.output or Path(options.clt_checkpoint_path) / "evaluation.json"), text + "\n")
    if options.json:
        print(text)
    else:
        Console().print(table(result))
