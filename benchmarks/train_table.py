"""Training speed of several workloads as one table (on stderr), and as one JSON line.

python benchmarks/train_table.py                      # S, minutes
python benchmarks/train_table.py --workloads S M V    # the large ones take most of an hour on two cores
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

_COLUMNS = {
    "tokens_per_second": "tokens/s",
    "tokens_per_cpu_second": "per CPU-second",
    "dense_equivalent_of_peak": "dense-equivalent of peak",
    "ratio_to_plain": "times plain",
    "peak_memory_gib": "peak GiB",
    "loss": "loss",
    "loss_plain": "plain loss",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which rows."""

    workloads: tuple[str, ...] = ("S",)
    activations: tuple[str, ...] = ("jumprelu", "topk", "batchtopk")
    dtypes: tuple[str, ...] = ("fp32", "bf16")


def main() -> None:
    """Run `train_step.py` for each combination and print."""
    options, rows = tyro.cli(Options), []
    print(
        "| workload | " + " | ".join(_COLUMNS.values()) + " |",
        "|---" * (len(_COLUMNS) + 1) + "|",
        sep="\n",
        file=sys.stderr,
    )
    script = Path(__file__).with_name("train_step.py")
    for workload in options.workloads:
        for activation in options.activations:
            for dtype in options.dtypes:
                flags = ["--workload", workload, "--activation", activation, "--dtype", dtype]
                command = [sys.executable, str(script), *flags]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                cells = [f"{found[name]:.4g}" for name in _COLUMNS]
                print(f"| {workload} {activation} {dtype} | " + " | ".join(cells) + " |", file=sys.stderr)
                rows.append(found)
    print(json.dumps({"benchmark": "train_table", "rows": rows}))


if __name__ == "__main__":
    main()
