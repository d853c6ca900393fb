"""The loss curve of every activation on every route beside plain PyTorch's: same weights, same batches.

    python benchmarks/train_curve.py                # 10 steps, two minutes
    python benchmarks/train_curve.py --steps 200

Prints one JSON line: for each activation the first and last plain loss, and by route and type the largest relative
difference of a loss along the way. fp64 (against plain PyTorch in fp64) shows whether both compute the same; `floor`
is how far plain PyTorch strays from itself in fp32 when each of its first weights is moved to the next number up or
down: no other order of the same sums can be expected to stay closer.
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
    dtypes: tuple[str, ...] = ("fp64", "fp32", "bf16")
    routes: tuple[str, ...] = ("dense", "sparse")
    steps: int = 10
    nudges: int = 1
    """Plain curves from weights moved by one rounding, each in other directions; 0: no floor."""
    threads: int = 1


def curve(options: Any, steps: int, is_plain: bool, nudge: int | None = None) -> torch.Tensor:
    """The losses of some steps."""
    bench = Workbench(options)
    if nudge is not None:
        move_by_one_rounding(bench.plain.model, nudge)
    losses = []
    for step in range(steps):
        batch = bench.batch(step)
        if is_plain:
            losses.append(float(bench.plain.step(batch, step)))
        else:
            losses.append(float(bench.engine.step(batch, step, bench.dead).losses.total))
    return torch.tensor(losses, dtype=torch.float64)


def move_by_one_rounding(model: torch.nn.Module, seed: int) -> None:
    """Every weight becomes the next larger or the next smaller number of its type, at random."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            up = torch.rand(weight.shape, generator=rng) < 0.5
            infinity = torch.full_like(weight, float("inf"))
            weight.copy_(torch.nextafter(weight, torch.where(up, infinity, -infinity)))


def strays(ours: torch.Tensor, plain: torch.Tensor) -> float:
    """The largest relative difference of a loss."""
    return float(((ours - plain).abs() / plain).max())


def differences(options: Options, activation: str) -> dict[str, Any]:
    """One activation: how far each route and type strays from the reference."""
    base = StepOptions(workload="S", activation=activation, threads=options.threads)  # pyright: ignore
    plain = curve(base, options.steps, True)
    found: dict[str, Any] = {"first": float(plain[0]), "last": float(plain[-1])}
    if options.nudges > 0:
        nudged = [curve(base, options.steps, True, nudge) for nudge in range(options.nudges)]
        found["floor"] = max(strays(each, plain) for each in nudged)
        print(activation, "floor", *(f"{strays(each, plain):.2e}" for each in nudged), file=sys.stderr, flush=True)
    for dtype in options.dtypes:
        typed = replace(base, dtype=dtype)  # pyright: ignore[reportArgumentType]
        reference = curve(typed, options.steps, True) if dtype == "fp64" else plain
        for route in options.routes:
            ours = curve(replace(typed, route=route), options.steps, False)  # pyright: ignore[reportArgumentType]
            found[f"{route} {dtype}"] = strays(ours, reference)
            print(activation, route, dtype, f"{found[f'{route} {dtype}']:.2e}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Compare and print."""
    options = tyro.cli(Options)
    curves = {activation: differences(options, activation) for activation in options.activations}
    print(json.dumps({"benchmark": "train_curve", "workload": "S", "steps": options.steps, **curves}))


if __name__ == "__main__":
    main()
