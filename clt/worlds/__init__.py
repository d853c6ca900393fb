"""Embedded worlds: tiny places with known truth, and the tiny hosts trained in them.

`load("shapes")` is all a caller needs. Nothing heavy is imported before that.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Literal, overload

from clt.errors import WorldError
from clt.worlds.base import SPLITS, HostedWorld, Split, World

if TYPE_CHECKING:
    from clt.worlds.features import FeaturesWorld
    from clt.worlds.shapes.world import ShapesWorld
    from clt.worlds.two_hop.world import TwoHopWorld

WORLDS = {
    "shapes": ("clt.worlds.shapes.world", "ShapesWorld"),
    "two-hop": ("clt.worlds.two_hop.world", "TwoHopWorld"),
    "features": ("clt.worlds.features", "FeaturesWorld"),
}

__all__ = ["SPLITS", "WORLDS", "HostedWorld", "Split", "World", "load"]


@overload
def load(name: Literal["shapes"]) -> ShapesWorld: ...
@overload
def load(name: Literal["two-hop"]) -> TwoHopWorld: ...
@overload
def load(name: Literal["features"]) -> FeaturesWorld: ...
@overload
def load(name: str) -> World: ...
def load(name: str) -> World:
    """The world of that name; a name that does not exist is refused with the closest one that does."""
    if name not in WORLDS:
        close = difflib.get_close_matches(name.lower().replace("_", "-"), WORLDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise WorldError(f"There is no world {name!r}.{hint} The worlds are: {', '.join(WORLDS)}.")
    module, class_name = WORLDS[name]
    return getattr(importlib.import_module(module), class_name)()
