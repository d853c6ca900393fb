"""Train a cross-layer transcoder on captured activations.

The number of layers and their width come from the data. An interrupted run goes on when the same command is given
again. Example:

    clt train --data activations/gpt2/pile_train --output-dir runs/gpt2 --num-features 3072
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from clt.config import CLTConfig, TrainingConfig
from clt.data.stores import LocalActivationStore
from clt.errors import ConfigError
from clt.training.trainer import CLTTrainer
from clt.types import ActivationBatch

# Stand for the data's own sizes while flags are parsed; `main` puts the real ones in.
_UNKNOWN_LAYERS, _UNKNOWN_WIDTH = 1_000_000, 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Data, transcoder, training."""

    output_dir: Annotated[str, tyro.conf.arg(aliases=("--output",))] = "runs/clt"
    """Folder of the run: result, metrics, checkpoints."""
    held_out: str | None = None
    """Folder of held-out activations; by default `held_out` beside a training folder called `train`."""
    device: str | None = None
    """Torch device; default: a GPU if there is one."""
    clt: Annotated[CLTConfig, tyro.conf.arg(name="")] = CLTConfig(
        num_features=4096, num_layers=_UNKNOWN_LAYERS, d_model=_UNKNOWN_WIDTH
    )
    """What to train."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig()
    """How to train it."""


def split_folders(data: str, held_out: str | None = None) -> tuple[Path, Path | None]:
    """The training folder and the held-out one, given either the training folder or the folder above both."""
    root = Path(data)
    train = root / "train" if (root / "train").is_dir() else root
    beside = train.parent / "held_out"
    if held_out is not None:
        return train, Path(held_out)
    return train, beside if train.name == "train" and beside.is_dir() else None


def held_out_batches(folder: Path | None, tokens: int) -> Callable[[], Iterable[ActivationBatch]] | None:
    """A function that reads every held-out token once, in batches."""
    if folder is None:
        return None
    store = LocalActivationStore(folder, batch_size_tokens=tokens)
    return store.one_pass


def main(options: Options) -> None:
    """Train, evaluate on the held-out split if there is one, and say where the result is."""
    if options.training.activation_path is None:
        raise ConfigError("Which activations? Give --data FOLDER, a folder that `clt generate` wrote.")
    train, held_out = split_folders(options.training.activation_path, options.held_out)
    training = options.training.replace(activation_path=str(train))
    store = LocalActivationStore(
        train,
        batch_size_tokens=training.train_batch_size_tokens,
        seed=training.seed,
        dtype=getattr(torch, training.activation_dtype),
    )
    hook = store.metadata.info
    config = options.clt.replace(
        num_layers=store.n_layers,
        d_model=store.d_model,
        model_name=options.clt.model_name or hook.model_name,
        expected_input_dtype=training.activation_dtype,
    )
    trainer = CLTTrainer(
        config,
        training,
        options.output_dir,
        options.device,
        store=store,
        held_out=held_out_batches(held_out, training.train_batch_size_tokens),
    )
    if trainer.folder.is_finished:
        print(f"{options.output_dir} already holds this run, finished. Delete the folder to train again.")
        return
    if trainer.step:
        print(f"Going on from step {trainer.step} of {training.training_steps}.")
    trainer.train()
    print(f"Transcoder in {options.output_dir} (cfg.json, clt.safetensors; metrics.jsonl).")
    if held_out is not None:
        result = trainer.evaluate()
        print(
            f"Held out, {result.n_tokens:,} tokens: NMSE {result.nmse:.4f} (EV {result.explained_variance:.4f}), "
            f"L0 {result.l0:.1f} per layer, dead {result.dead_share:.2%}."
        )
