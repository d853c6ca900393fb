"""How close `clt plan` comes to what a training run takes: peak memory of small runs, said and measured.

    python benchmarks/plan.py

Each run is a process of its own that trains a few steps with the code of `clt train` on made-up activations, saves, and
reports the largest anonymous memory it held (memory maps of the data set left out) while it was set up, while it
trained and while it evaluated, less what it held after a tiny run of the same kind. Two coefficients of the plan were
set by the first three runs; the others had no part in it. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from clt.config import CLTConfig, TrainingConfig
from clt.data.metadata import DatasetInfo
from clt.data.writer import ActivationWriter
from clt.training.plan import plan_run
from clt.types import ActivationBatch

MOMENTS = ("setup", "step", "evaluation")
"""Of a run; only one is at a time."""
FITTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "jumprelu, fp32": (
        {"num_layers": 5, "d_model": 128, "num_features": 4096},
        {"train_batch_size_tokens": 512, "route": "dense"},
    ),
    "batchtopk, bf16, 3 targets": (
        {"num_layers": 6, "d_model": 128, "num_features": 4096, "n_targets": 3}
        | {"activation_fn": "batchtopk", "batchtopk_k": 6 * 8},
        {"train_batch_size_tokens": 1024, "precision": "bf16"},
    ),
    "topk, tied per source, autograd": (
        {"num_layers": 5, "d_model": 128, "num_features": 4096}
        | {"activation_fn": "topk", "topk_k": 16, "decoder_tying": "per_source"},
        {"train_batch_size_tokens": 512},
    ),
}
"""Three shapes and ways of training, each of another route; sizes that leave Python's own memory far behind."""
RUNS = FITTED | {
    "relu, fp32, deep": (
        {"num_layers": 12, "d_model": 384, "num_features": 1536, "activation_fn": "relu"},
        {"train_batch_size_tokens": 512, "route": "dense"},
    ),
    "topk, offloaded, saved beside the steps, mean weights": (
        {"num_layers": 8, "d_model": 256, "num_features": 3072, "activation_fn": "topk", "topk_k": 24},
        {"train_batch_size_tokens": 1024, "offload_optimizer": True, "async_save": True, "checkpoint_interval": 1}
        | {"ema_decay": 0.99},
    ),
    "jumprelu, bf16, optimiser in backward": (
        {"num_layers": 8, "d_model": 320, "num_features": 2560},
        {"train_batch_size_tokens": 768, "precision": "bf16", "route": "dense", "recompute_encoder": True}
        | {"optimizer_in_backward": True, "gradient_clip_val": None},
    ),
}
"""Further ones, whose peaks are elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    run: str | None = None
    """Train this one in this process and print its memory: what the subprocesses do."""
    only: tuple[str, ...] = ()
    """Names (or their beginnings) of the runs; all by default."""
    steps: int = 3
    """Optimiser steps of each run."""


class Resident:
    """The largest anonymous memory of this process while it lasts, looked at every ten milliseconds."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, anonymous_memory())
            time.sleep(0.01)


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def write_activations(folder: Path, layers: int, d_model: int, tokens: int) -> None:
    """A data set of noise, and held-out ones beside it."""
    rng = torch.Generator().manual_seed(0)
    info = DatasetInfo(model_name="noise", dataset="noise", split="train", num_layers=layers, d_model=d_model)
    for part in ("train", "held_out"):
        with ActivationWriter(folder / part, info) as writer:
            for start in range(0, tokens, 1024):
                x, y = (torch.randn(layers, 1024, d_model, generator=rng).bfloat16() for _ in "xy")
                rows = torch.arange(start, start + 1024)
                writer.append(ActivationBatch(x, y, torch.zeros(1024, dtype=torch.uint8), rows, rows))


def train(folder: Path, clt: dict[str, Any], training: dict[str, Any], steps: int) -> dict[str, int]:
    """What `clt train` does; the largest memory while it sets up, while it trains, and while it evaluates."""
    from clt.scripts.train import Options as TrainOptions
    from clt.scripts.train import open_trainer

    data = folder / "data"
    write_activations(data, clt["num_layers"], clt["d_model"], 2 * training["train_batch_size_tokens"])
    details = {"training_steps": steps, "activation_path": str(data / "train"), "write_final_folder": False}
    options = TrainOptions(
        output_dir=str(folder / "run"),
        device="cpu",
        clt=CLTConfig(**clt),
        training=TrainingConfig(**training, **details),
    )
    before = anonymous_memory()
    with Resident() as setup:
        trainer = open_trainer(options)
    held_out, trainer.held_out = trainer.held_out, None  # else the last step would be measured with an evaluation
    running = trainer.steps()
    with Resident() as step:
        while next(running) < steps:
            pass
    trainer.held_out = held_out
    with Resident() as evaluation:
        trainer.evaluate()
    running.close()
    return {"before": before, "setup": setup.peak, "step": step.peak, "evaluation": evaluation.peak}


def measure(name: str, steps: int) -> dict[str, int]:
    """Memory of one run in this process, after a tiny one that loads everything Python and torch load."""
    torch.set_num_threads(1)
    clt, training = RUNS[name]
    small = {**clt, "num_features": 64, "num_layers": 2, "d_model": 16, "n_targets": None}
    small |= {field: 4 for field in ("topk_k", "batchtopk_k") if field in clt}
    for shape, tokens in ((small, 64), (clt, training["train_batch_size_tokens"])):
        with tempfile.TemporaryDirectory() as folder:
            found = train(Path(folder), shape, {**training, "train_batch_size_tokens": tokens}, steps)
    return {part: found[part] - found["before"] for part in MOMENTS}


def measured(name: str, steps: int) -> dict[str, int]:
    """`measure` in a process of its own, in which glibc gives freed blocks back (see docs/performance.md)."""
    command = [sys.executable, __file__, "--run", name, "--steps", str(steps)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, steps: int) -> dict[str, Any]:
    """One run: what the plan says and what the process took, in MiB."""
    clt, training = RUNS[name]
    said = plan_run(CLTConfig(**clt), TrainingConfig(**training), "1xcpu")
    found = measured(name, steps)
    mib = {"predicted": said.moments, "measured": found}
    return {
        "run": name,
        "fitted": name in FITTED,
        "route": said.route,
        **{f"{kind}_mib": {part: round(of[part] / 2**20, 1) for part in MOMENTS} for kind, of in mib.items()},
        "ratio": {part: round(said.moments[part] / found[part], 3) for part in MOMENTS},
        "peak_ratio": round(said.peak / max(found.values()), 3),
        "parts_mib": {part: round(value / 2**20, 1) for part, value in asdict(said.memory).items()},
    }


def chosen(names: Sequence[str]) -> list[str]:
    """The runs asked for."""
    return [run for run in RUNS if not names or any(run.startswith(name) for name in names)]


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options)
    if options.run is not None:
        print(json.dumps(measure(options.run, options.steps)))
        return
    print(json.dumps({"runs": [compare(name, options.steps) for name in chosen(options.only)]}))


if __name__ == "__main__":
    main()
