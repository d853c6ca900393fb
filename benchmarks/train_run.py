"""A whole training run, data included: tokens per second, share of the time spent on data, and quality after a time.

    python benchmarks/train_run.py --workload S --activation topk --seconds 30

Writes made-up activations with known sparse features as a data set, trains on it with the trainer that `clt train`
uses, and evaluates on held-out tokens. Prints one JSON line.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from train_step import Options as StepOptions  # pyright: ignore[reportMissingImports]  # beside this file
from train_step import Workbench  # pyright: ignore[reportMissingImports]

from clt.config import TrainingConfig
from clt.data import ActivationWriter, DatasetInfo, LocalActivationStore
from clt.training.trainer import CLTTrainer


@dataclass(frozen=True, kw_only=True)
class Options(StepOptions):
    """What to train, and for how long; beside the options of a step."""

    seconds: float = 30.0
    """Training time, data included."""
    batches: int = 40
    """Size of the data set, in batches; a tenth more is held out."""


class StopAfter:
    """A tracker that ends the run, and keeps its last numbers."""

    def __init__(self) -> None:
        self.ends_at = float("inf")
        self.last: dict[str, float] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take in the numbers of a step."""
        self.last = {"step": step, **values}
        if time.perf_counter() > self.ends_at:
            raise TimeoutError

    def close(self) -> None:
        """Nothing to close."""


def write(folder: Path, bench: Any, seeds: range) -> Path:
    """Batches as a data set."""
    size = bench.size
    info = DatasetInfo(
        model_name="made-up", dataset="sparse", split="train", num_layers=size.layers, d_model=size.d_model
    )
    with ActivationWriter(folder, info) as writer:
        for seed in seeds:
            writer.append(bench.batch(seed))
    return folder


def main() -> None:
    """Write, train, evaluate, print."""
    options = tyro.cli(Options)
    if options.dtype == "fp64":
        raise SystemExit("--dtype fp64 is for single steps (train_step.py); a run trains in fp32 or bf16.")
    bench = Workbench(options)
    with tempfile.TemporaryDirectory() as folder:
        held_out_seeds = range(options.batches, options.batches + max(1, options.batches // 10))
        data = write(Path(folder, "train"), bench, range(options.batches))
        held = LocalActivationStore(
            write(Path(folder, "held"), bench, held_out_seeds), batch_size_tokens=bench.size.tokens
        )
        training = TrainingConfig(
            training_steps=1_000_000,
            train_batch_size_tokens=bench.size.tokens,
            activation_path=str(data),
            precision=options.dtype,
            route=options.route,
            learning_rate=1e-3,
            lr_scheduler="constant",
            log_interval=1,
            sparsity_lambda_schedule="constant",
        )
        stop = StopAfter()
        config = bench.model.config.replace(normalization_method="rms")
        trainer = CLTTrainer(
            config, training, Path(folder, "run"), "cpu", held_out=held.one_pass, trackers=[stop], shows_progress=False
        )
        start = time.perf_counter()
        stop.ends_at = start + options.seconds
        with suppress(TimeoutError):
            trainer.train()
        seconds = time.perf_counter() - start
        quality = trainer.evaluate()
    result = {
        "benchmark": "train_run",
        **{name: getattr(options, name) for name in ("workload", "activation", "dtype", "route")},
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "steps": stop.last["step"],
        "tokens_per_second": stop.last["step"] * bench.size.tokens / seconds,
        "data_share": stop.last["data_share"],
        "held_out_nmse": quality.nmse,
        "held_out_l0": quality.l0,
        "dead_share": quality.dead_share,
    }
    print(json.dumps({name: round(v, 5) if isinstance(v, float) else v for name, v in result.items()}))


if __name__ == "__main__":
    main()
