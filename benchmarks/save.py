"""How long training stands still for a checkpoint: written between the steps, or beside them (--async-save).

    python benchmarks/save.py

Trains on made-up activations and takes the median over some checkpoints, the first left out, which makes the memory for
the copies. Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from plan import write_activations  # pyright: ignore[reportMissingImports]  # beside this file

from clt.config import CLTConfig, TrainingConfig
from clt.training.trainer import CLTTrainer


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    layers: int = 8
    d_model: int = 256
    features: int = 2048
    """Per layer."""
    tokens: int = 256
    """Per step."""
    checkpoints: int = 6


def stands_still(options: Options, folder: Path, waits: bool) -> dict[str, float]:
    """Seconds of a checkpoint: until training goes on, and until it is there."""
    config = CLTConfig(num_features=options.features, num_layers=options.layers, d_model=options.d_model)
    training = TrainingConfig(
        activation_path=str(folder / "data" / "train"),
        train_batch_size_tokens=options.tokens,
        checkpoint_interval=10**6,
    )
    trainer = CLTTrainer(config, training, folder / f"waits_{waits}", "cpu", shows_progress=False)
    blocked, whole = [], []
    for _ in range(options.checkpoints):
        trainer.update(next(trainer.store))
        begin = time.perf_counter()
        trainer.checkpoints.save(waits=waits)
        blocked.append(time.perf_counter() - begin)
        trainer.checkpoints.finish()
        whole.append(time.perf_counter() - begin)
    files = (folder / f"waits_{waits}" / "checkpoints").glob(f"step_{options.checkpoints:08d}/*")
    return {
        "blocked_seconds": round(statistics.median(blocked[1:]), 4),
        "seconds": round(statistics.median(whole[1:]), 4),
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
    }


def main(options: Options) -> None:
    """Measure both and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_activations(folder / "data", options.layers, options.d_model, 2 * options.tokens)
        both = {kind: stands_still(options, folder, kind == "between") for kind in ("between", "beside")}
    print(json.dumps({**both, "torch": torch.__version__}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
