"""What a world is: a place so small that everything true about it is known.

A world with a host ships the weights of a tiny model that was trained in it. Scenes of the splits `train` and
`held_out` come from disjoint seeds, so that a number measured on `held_out` was never trained on, by the host or
by a transcoder.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from clt.errors import WorldError

if TYPE_CHECKING:
    from clt.types import Sample

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@runtime_checkable
class World(Protocol):
    """The least every world has."""

    @property
    def name(self) -> str:
        """What `load` calls it."""
        ...

    @property
    def summary(self) -> str:
        """One line for lists."""
        ...


@runtime_checkable
class HostedWorld(World, Protocol):
    """A world with a tiny model trained in it, and questions whose answers are known."""

    def host_path(self) -> Path:
        """Folder to pass to `from_pretrained`."""
        ...

    def samples(self, split: Split, n: int, seed: int = 0) -> list[Sample]:
        """Prompts with the answer the training text gives, to capture the host on."""
        ...

    def questions(self, split: Split, n: int, seed: int = 0) -> list[Sample]:
        """Prompts without answer, to be generated and scored."""
        ...


def assets_path(world: str) -> Path:
    """Where a world's shipped files lie inside the installed package, whether or not they exist yet."""
    return Path(str(files("clt.worlds"))) / "assets" / world


def shipped_host(world: str) -> Path:
    """The folder with a world's trained host; an error says how to train it if it is missing."""
    folder = assets_path(world)
    if not (folder / "model.safetensors").is_file():
        raise WorldError(
            f"The {world} world has no weights in {folder}.\n"
            "The installation is probably incomplete. Install the package again, or train the host with "
            f"`python -m clt.worlds.train {world}`."
        )
    return folder


def split_number(split: str) -> int:
    """A split's place in every random seed, so that no two splits ever share one."""
    if split not in SPLITS:
        raise WorldError(f"There is no split {split!r}. A world has the splits {', '.join(SPLITS)}.")
    return SPLITS.index(split)
