"""Train a world's host again: `python -m clt.worlds.train shapes`.

Without `--output` the shipped weights inside the package are replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from clt.worlds.base import assets_path
from clt.worlds.shapes.training import ShapesRecipe, train_shapes
from clt.worlds.two_hop.training import TwoHopRecipe, train_two_hop


@dataclass(frozen=True, kw_only=True)
class TrainShapes:
    """The shapes world's LLaVA: vision alignment, then end to end on the annotators' text."""

    recipe: Annotated[ShapesRecipe, tyro.conf.OmitArgPrefixes] = field(default_factory=ShapesRecipe)
    output: Path | None = None
    """Folder for the host; default: the one inside the package."""
    threads: int = 1
    """Threads for torch; one is the surest choice on a machine that has other work to do."""


@dataclass(frozen=True, kw_only=True)
class TrainTwoHop:
    """The two-hop world's Llama, on its knowledge base."""

    recipe: Annotated[TwoHopRecipe, tyro.conf.OmitArgPrefixes] = field(default_factory=TwoHopRecipe)
    output: Path | None = None
    """Folder for the host; default: the one inside the package."""
    threads: int = 1
    """Threads for torch."""


def run(options: TrainShapes | TrainTwoHop) -> dict[str, Any]:
    """Train one host with a progress bar on standard error; returns its record."""
    torch.set_num_threads(options.threads)
    name = "shapes" if isinstance(options, TrainShapes) else "two-hop"
    folder = options.output or assets_path(name)
    with tqdm(total=options.recipe.total_steps, desc=name, unit="step") as bar:
        if isinstance(options, TrainShapes):
            return train_shapes(options.recipe, folder, _shown_on(bar))
        return train_two_hop(options.recipe, folder, _shown_on(bar))


def _shown_on(bar: tqdm) -> Callable[[int, float], None]:
    def report(steps_done: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(steps_done - bar.n)

    return report


def main(arguments: list[str] | None = None) -> None:
    """The command: prints the training record as JSON."""
    commands = {"shapes": TrainShapes, "two-hop": TrainTwoHop}
    options = tyro.extras.subcommand_cli_from_dict(commands, args=arguments)
    sys.stdout.write(json.dumps(run(options), indent=2) + "\n")


if __name__ == "__main__":
    main()
