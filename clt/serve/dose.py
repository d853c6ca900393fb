"""What a reader of a graph asks for when a feature is steered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from clt.attribution.view import GraphView


@dataclass(frozen=True, kw_only=True)
class Dose:
    """What to do to which feature."""

    layer: int
    feature: int
    position: int | None
    """Of the prompt; None: every position, also of the answer."""
    mode: Literal["scale", "add", "set"]
    value: float


@runtime_checkable
class Steering(Protocol):
    """Whatever can answer a dose."""

    def steer(self, view: GraphView, dose: Dose) -> dict[str, Any]:
        """`{"before": side, "after": side}`, a side being `{"top": [{"token", "probability"}], "text"}`."""
        ...
