"""How tokens per CPU second fall with features, layers and k, and grow with tokens per step: rates and log-log slopes.

    python benchmarks/train_scaling.py

One thread; topk by gathers, jumprelu by products. Prints one JSON line.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch
from train_step import Options, Workbench  # pyright: ignore[reportMissingImports]  # beside this file

_BASE: dict[str, Any] = {"workload": "S", "layers": 4, "features": 2048, "tokens": 512, "k": 16}
_AXES = {
    "features": (1024, 2048, 4096, 8192),
    "layers": (2, 4, 8),
    "k": (8, 16, 32, 64),
    "tokens": (256, 512, 1024, 2048),
}
_STEPS = 3


def rate(**options: Any) -> float:
    """Tokens per CPU second, best of a few steps after a first one."""
    bench = Workbench(Options(**{**_BASE, **options}))
    batches = [bench.batch(seed) for seed in range(_STEPS + 1)]
    seconds = []
    for step, batch in enumerate(batches):
        start = time.process_time()
        bench.engine.step(batch, step, bench.dead)
        seconds.append(time.process_time() - start)
    return bench.size.tokens / min(seconds[1:])


def slope(x: tuple[int, ...], y: list[float]) -> float:
    """Of the straight line through the logarithms."""
    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    mean_x, mean_y = (sum(each) / len(logs) for each in zip(*logs, strict=True))
    return sum((a - mean_x) * (b - mean_y) for a, b in logs) / sum((a - mean_x) ** 2 for a, _ in logs)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    curves = {}
    for activation, route in (("topk", "sparse"), ("jumprelu", "dense")):
        for axis, values in _AXES.items():
            if activation == "jumprelu" and axis == "k":
                continue
            rates = [rate(activation=activation, route=route, **{axis: value}) for value in values]
            curves[f"{activation} {axis}"] = {
                "values": values,
                "tokens_per_cpu_second": [round(each) for each in rates],
                "slope": round(slope(values, rates), 2),
            }
    print(json.dumps({"benchmark": "train_scaling", **curves}))


if __name__ == "__main__":
    main()
