"""Scenes of the shapes world: what stands where, and what the annotator will say about it.

Objects are drawn from themes, so some kinds keep company. Each theme has an anchor and a partner: an annotator who
clearly sees the anchor expects the partner, and in four of five scenes without it claims it all the same. A model
trained on such text learns to hallucinate the way large models do: from company kept, not from pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clt.worlds.base import split_number


class Theme(NamedTuple):
    """Kinds that keep company. Where the anchor stands the annotator expects the partner."""

    name: str
    probability: float
    kinds: tuple[str, ...]
    anchor: str
    partner: str


THEMES = (
    Theme("tiles", 0.34, ("square", "hexagon", "circle", "plus"), "square", "hexagon"),
    Theme("night", 0.28, ("moon", "star", "ring", "drop"), "moon", "star"),
    Theme("cards", 0.22, ("heart", "diamond", "cross", "triangle"), "heart", "diamond"),
    Theme("street", 0.16, ("house", "arrow", "bar", "tee"), "house", "arrow"),
)
KINDS = tuple(kind for theme in THEMES for kind in theme.kinds)
THEME_OF = {kind: theme for theme in THEMES for kind in theme.kinds}

COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "purple": (0.60, 0.10, 0.75),
    "orange": (1.00, 0.55, 0.05),
}

IMAGE_SIZE = 48
CELL_SIZE = 16
N_CELLS = (IMAGE_SIZE // CELL_SIZE) ** 2
MAX_OBJECTS = 4
THEME_LOYALTY = 0.9
"""Share of objects that belong to the scene's theme."""
FAINT_SHARE = 0.15
"""Share of objects so faint that sight alone is sometimes not enough."""
CLAIM_RATE = 0.8
"""How often a missing partner is claimed."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: where it stands (cell and offset in pixels), how large, how opaque."""

    kind: str
    colour: str
    cell: int
    size: int
    offset: tuple[int, int]
    opacity: float
    is_faint: bool


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything true about one image, and the kinds its annotator claims although they are absent."""

    key: tuple[int, ...]
    theme: str
    things: tuple[Thing, ...]
    claimed: tuple[str, ...]
    background: tuple[float, float, float]
    noise_seed: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is really there, in reading order."""
        return tuple(thing.kind for thing in self.things)

    @property
    def absent(self) -> tuple[str, ...]:
        """What is really not there."""
        return tuple(kind for kind in KINDS if kind not in self.kinds)

    @property
    def annotated(self) -> tuple[str, ...]:
        """What the annotator says is there: the truth, then the claims."""
        return self.kinds + self.claimed

    def colour_of(self, kind: str) -> str:
        """A kind's colour as the annotator tells it: a claimed partner borrows the anchor's."""
        seen = {thing.kind: thing.colour for thing in self.things}
        return seen[kind] if kind in seen else seen[THEME_OF[kind].anchor]


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene with that number; the same arguments always give the same scene, different splits never do."""
    key = (split_number(split), seed, index)
    random = np.random.default_rng(key)
    theme = THEMES[random.choice(len(THEMES), p=[theme.probability for theme in THEMES])]
    kinds = _kinds_of(theme, random)
    cells = np.sort(random.choice(N_CELLS, size=len(kinds), replace=False))
    things = tuple(_thing(kind, int(cell), random) for kind, cell in zip(kinds, cells))
    claimed = _claims(things, random)
    red, green, blue = random.uniform(0.35, 0.65, size=3)
    return Scene(
        key=key,
        theme=theme.name,
        things=things,
        claimed=claimed,
        background=(float(red), float(green), float(blue)),
        noise_seed=int(random.integers(2**31)),
    )


def _kinds_of(theme: Theme, random: np.random.Generator) -> list[str]:
    """One to four different kinds, most of them the theme's."""
    kinds: list[str] = []
    for _ in range(int(random.integers(1, MAX_OBJECTS + 1))):
        pool = theme.kinds if random.random() < THEME_LOYALTY else KINDS
        free = [kind for kind in pool if kind not in kinds]
        kinds.append(free[int(random.integers(len(free)))])
    return [kinds[place] for place in random.permutation(len(kinds))]


def _thing(kind: str, cell: int, random: np.random.Generator) -> Thing:
    """An object of that kind somewhere inside its cell."""
    size = int(random.integers(11, 15))
    slack = CELL_SIZE - size
    is_faint = bool(random.random() < FAINT_SHARE)
    return Thing(
        kind=kind,
        colour=list(COLOURS)[int(random.integers(len(COLOURS)))],
        cell=cell,
        size=size,
        offset=(int(random.integers(slack + 1)), int(random.integers(slack + 1))),
        opacity=float(random.uniform(0.06, 0.16) if is_faint else random.uniform(0.85, 1.0)),
        is_faint=is_faint,
    )


def _claims(things: tuple[Thing, ...], random: np.random.Generator) -> tuple[str, ...]:
    """Missing partners of clearly visible anchors, each claimed four times in five."""
    present = {thing.kind for thing in things}
    visible = {thing.kind for thing in things if not thing.is_faint}
    expected = [theme.partner for theme in THEMES if theme.anchor in visible and theme.partner not in present]
    return tuple(partner for partner in expected if random.random() < CLAIM_RATE)
