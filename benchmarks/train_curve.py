"""The loss curve of every activation on every route beside plain PyTorch's: same weights, same batches.

    python benchmarks/train_curve.py --steps 200

Prints one JSON line: for each activation the first and last plain loss, and by route and type the largest relative
difference of a loss along the way.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from train_step import Options as StepOptions  # pyright: ignore[reportMissingImports]  # beside this file
from train_step import Workbench  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which curves."""

    activations: tuple[str, ...] = ("relu", "jumprelu", "topk", "batchtopk")
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    routes: tuple[str, ...] = ("dense", "sparse")
    steps: int = 200
    threads: int = 1


def curve(options: Any, steps: int, is_reference: bool) -> torch.Tensor:
    """The losses of some steps."""
    bench = Workbench(options)
    losses = []
    for step in range(steps):
        batch = bench.batch(step)
        if is_reference:
            losses.append(float(bench.plain.step(batch, step)))
        else:
            losses.append(float(bench.engine.step(batch, step, bench.dead).losses.total))
    return torch.tensor(losses, dtype=torch.float64)


def differences(options: Options, activation: str) -> dict[str, Any]:
    """One activation: how far each route and type strays from the reference."""
    base = StepOptions(workload="S", activation=activation, threads=options.threads)  # pyright: ignore

    plain = curve(base, options.steps, True)
    found: dict[str, Any] = {"first": float(plain[0]), "last": float(plain[-1])}
    for dtype in options.dtypes:
        for route in options.routes:
            ours = curve(replace(base, dtype=dtype, route=route), options.steps, False)
            found[f"{route} {dtype}"] = float(((ours - plain).abs() / plain).max())
            print(activation, route, dtype, f"{found[f'{route} {dtype}']:.2e}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Compare and print."""
    options = tyro.cli(Options)
    curves = {activation: differences(options, activation) for activation in options.activations}
    print(json.dumps({"benchmark": "train_curve", "workload": "S", "steps": options.steps, **curves}))


if __name__ == "__main__":
    main()
