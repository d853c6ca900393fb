"""The whole job on the embedded vision-language model, in minutes, without any download.

A tiny LLaVA that really hallucinates -> its activations -> a cross-layer and a per-layer transcoder -> both put in
place of the MLPs -> benchmark scores of host and replacements -> the features behind its inventions, steered beside
random ones -> one invention as an attribution graph -> figures, `report.html` and `summary.json`.

Stopped with Ctrl-C, the same command goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from clt.config.base import Config


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """How much of everything; `--quick` is a look, not a measurement."""

    output_dir: Annotated[str, tyro.conf.arg(aliases=("--output",))] = "runs/demo"
    """Folder for everything the demo makes."""
    world: str = "shapes"
    """Embedded world with a vision-language host."""
    quick: bool = False
    """Fewer steps and questions: a look, not a measurement."""
    threads: int | None = None
    """CPU threads; None: one per core."""


def main(options: Options) -> None:
    """Run all stages and say where the report is."""
    from clt.scripts.demo.pipeline import Demo

    Demo(options).run()
    print(f"Open {Path(options.output_dir) / 'report.html'} in a browser.")
