"""Checkpoints in parts: what is in them, in one piece, in other parts.

A run on several ranks saves slices of one checkpoint, which a run on any number of ranks goes on from as it is. To use
such a checkpoint as a transcoder, or to carry it elsewhere, merge it. Examples:

    clt checkpoint info runs/gpt2/checkpoints/step_00001000
    clt checkpoint merge runs/gpt2/checkpoints/step_00001000 --out gpt2-step-1000
    clt checkpoint split gpt2-step-1000 --parts 8 --out gpt2-in-8
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from clt.config import CLTConfig
from clt.errors import ConfigError
from clt.models.checkpoint import CONFIG
from clt.models.slices import Slices, merge, split


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to do with which checkpoint."""

    action: tyro.conf.Positional[Literal["info", "merge", "split"]]
    """info, merge (into one piece), split (into --parts)."""
    folder: tyro.conf.Positional[Path]
    """A checkpoint of a run, or a transcoder."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=("--output",))] = None
    """Where merge and split write; a new folder."""
    parts: int = 2
    """Into how many."""


def main(options: Options) -> dict[str, Any]:
    """Do it, and say what came out."""
    if options.action == "info":
        found = info(options.folder)
        for name, value in found.items():
            print(f"{name:<13} {value:,}" if isinstance(value, int) else f"{name:<13} {value}")
        return found
    target = _new_folder(options)
    if options.action == "merge":
        merge(options.folder, target)
        print(f"{target}: in one piece (cfg.json, clt.safetensors).")
    else:
        split(options.folder, options.parts, target)
        print(f"{target}: in {options.parts} parts (cfg.json, slices.json).")
    return {"folder": str(target), "parts": Slices.open(target).n_parts}


def plan(options: Options) -> dict[str, Any]:
    """What would be read and written."""
    found = info(options.folder)
    read = {"read": f"{options.folder}: {found['files']} file(s), {found['weights_bytes'] / 1e6:,.1f} MB of weights"}
    return read if options.action == "info" else {**read, "write": str(_new_folder(options))}


def _new_folder(options: Options) -> Path:
    """Where to write, once all that is asked for makes sense."""
    features = CLTConfig.from_json(options.folder / CONFIG).num_features
    if options.action == "split" and not 1 <= options.parts <= features:
        raise ConfigError(
            f"--parts {options.parts} must lie between 1 and the {features} features per layer there are."
        )
    if options.out is None:
        raise ConfigError(f"Where to? Give `clt checkpoint {options.action} {options.folder}` an --out FOLDER.")
    if options.out.exists() and any(options.out.iterdir()):
        raise ConfigError(f"--out {options.out} is not empty. Name a new folder; nothing is written over.")
    return options.out


def info(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds.

    Raises:
        CheckpointError: it is none, or rows of a tensor are missing.
    """
    slices = Slices.open(folder)
    config = CLTConfig.from_json(folder / CONFIG)
    bytes_of = {
        title: sum(slices.size(name) for name in slices.named(prefix))
        for title, prefix in (
            ("weights", "clt/"),
            ("moments", "trainer/optimizer/"),
            ("mean_weights", "trainer/average/"),
        )
    }
    return {
        "layers": config.num_layers,
        "features": config.num_features,
        "d_model": config.d_model,
        "activation_fn": config.activation_fn,
        "decoder_tying": config.decoder_tying,
        "files": slices.n_parts,
        "step": slices.step(),
        **{f"{title}_bytes": size for title, size in bytes_of.items()},
    }
