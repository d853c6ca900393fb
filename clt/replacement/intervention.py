"""Acting on features: what to do to which feature (or neuron), where, and by how much.

    scale   a -> value * a        set   a -> value        add   a -> a + value        ablate   a -> 0

Nothing is computed in advance: at every forward pass, so at every generated token, the activation at hand is taken
and changed. Values may be negative, and may leave the range the feature has by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from clt.errors import ConfigError
from clt.replacement.passes import Passes, Positions, check_positions

Kind = Literal["scale", "set", "add", "ablate"]
Unit = Literal["absolute", "std"]

Intervene = Callable[[int, Tensor], Tensor]
"""(layer, its feature activations `[row, position, feature]`) -> what to go on with."""


@dataclass(frozen=True)
class Intervention:
    """One change to one feature of a transcoder, or to one neuron of an MLP.

    Intervention(8, 3648, "scale", 2.0)                       # twice as strong, everywhere
    Intervention(8, 3648, "add", 1.5, unit="std", positions="generated")
    Intervention(3, 17, "ablate", positions=(0, -1))          # at the first and the last position of the prompt
    """

    layer: int
    feature: int
    kind: Kind
    value: float | None = None
    """Factor, new activation or offset; none for `ablate`."""
    unit: Unit = "absolute"
    """`set` and `add`: whether `value` is an activation, or a number of the feature's own standard deviations."""
    positions: Positions = "all"
    """`prompt`, `generated` (the answer's own tokens, when an answer is given), `text`, `image`, `special` (by kind of
    token), `last` (of the prompt: the one the answer starts from), or places in the row, 0 its first token, -1 the
    last of its prompt. Padding never counts."""

    def __post_init__(self) -> None:
        for name, allowed in (("kind", get_args(Kind)), ("unit", get_args(Unit))):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{self.name}: {name} = {getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}."
                )
        check_positions(self.name, self.positions)
        if self.layer < 0 or self.feature < 0:
            raise ConfigError(f"{self.name}: layers and features are numbered from 0.")
        if self.kind == "ablate":
            if self.value is not None:
                raise ConfigError(f"{self.name}: 'ablate' takes no value, but got {self.value}. Use 'set' for a value.")
        elif self.value is None or not math.isfinite(self.value):
            raise ConfigError(f"{self.name}: {self.kind!r} needs a finite value, but got {self.value}.")
        if self.unit == "std" and self.kind not in ("set", "add"):
            raise ConfigError(f"{self.name}: {self.kind!r} has no unit; unit = 'std' goes with 'set' and 'add'.")

    @property
    def name(self) -> str:
        """For messages."""
        return f"Intervention at feature {self.layer}:{self.feature}"

    @property
    def layers(self) -> Collection[int]:
        """Which layers are touched."""
        return (self.layer,)

    def change(
        self, activation: Float[Tensor, " token"], std: Float[Tensor, "layer feature"] | None
    ) -> Float[Tensor, " token"]:
        """The activations after it."""
        value = self.value or 0.0
        if self.unit == "std":
            assert std is not None
            value *= float(std[self.layer, self.feature])
        match self.kind:
            case "scale":
                return activation * value
            case "add":
                return activation + value
            case _:
                return torch.full_like(activation, value)


class Gains:
    """Factors on many features at once; a feature's may differ between image, rest of the prompt, and answer."""

    def __init__(self, by_layer: Mapping[int, Float[Tensor, "part feature"]]) -> None:
        """Layers without any are left alone.

        Args:
            by_layer: one row for all positions, or one for each of `passes.PARTS`.
        """
        self._by_layer = by_layer

    @property
    def layers(self) -> Collection[int]:
        """Which layers are touched."""
        return self._by_layer.keys()

    def scale(
        self, layer: int, features: Float[Tensor, "token feature"], parts: Callable[[], Integer[Tensor, " token"]]
    ) -> Float[Tensor, "token feature"]:
        """The features of one layer, times their factors.

        Args:
            parts: gives the part that each token is in; asked where it matters.
        """
        if layer not in self._by_layer:
            return features
        rows = self._by_layer[layer].to(features)
        return features * (rows[0] if len(rows) == 1 else rows[parts().to(rows.device)])


Interventions = Intervention | Gains | Intervene | Sequence[Intervention | Gains | Intervene]
"""One or several, applied in the order given; a plain callable sees (and may change in place) a whole layer."""


class Edit:
    """Interventions tied to a model's sizes and to the forward passes at hand."""

    def __init__(
        self,
        interventions: Interventions | None,
        passes: Passes,
        widths: Sequence[int],
        std: Float[Tensor, "layer feature"] | None = None,
        what: str = "feature",
    ) -> None:
        """Check every one.

        Args:
            widths: how many features each layer has.
            std: for interventions in standard deviations.
            what: `feature` or `neuron`, for messages.

        Raises:
            ConfigError: a layer or feature that is not there, or a unit whose size is not known.
        """
        if interventions is None:
            interventions = ()
        each = interventions if isinstance(interventions, Sequence) else (interventions,)
        for one in each:
            if isinstance(one, Intervention):
                _check_exists(one, widths, what)
                _check_unit(one, std, what)
        self._each = each
        self._passes = passes
        self._std = std
        self.needs_whole_layers = any(not isinstance(one, Intervention | Gains) for one in each)
        """Whether a plain callable must see all tokens of a pass at once."""
        named = sorted(set().union(*(one.layers for one in each if isinstance(one, Intervention | Gains))))
        self.layers: Sequence[int] | None = None if self.needs_whole_layers else named
        """Which layers are touched; None: a plain callable may touch any."""

    def touches(self, layer: int) -> bool:
        """Whether anything is to be done at this layer."""
        return self.layers is None or layer in self.layers

    def apply(
        self, layer: int, features: Float[Tensor, "token feature"], tokens: slice | None = None
    ) -> Float[Tensor, "token feature"]:
        """The activations of one layer after all interventions, in order; the given ones stay as they are.

        Args:
            features: of the current pass, rows one after the other.
            tokens: which of the pass's tokens these are; None: all.
        """
        features = features.clone()
        for one in self._each:
            if isinstance(one, Gains):
                features = one.scale(layer, features, lambda: self._passes.parts().reshape(-1)[tokens or slice(None)])
            elif not isinstance(one, Intervention):
                features = self._call(one, layer, features)
            elif one.layer == layer:
                where = self._passes.where(one.positions).reshape(-1)[tokens or slice(None)]
                features = self._change(one, features, where)
        return features

    def _change(self, one: Intervention, features: Tensor, where: Bool[Tensor, " token"]) -> Tensor:
        before = features[:, one.feature]
        after = torch.where(where.to(before.device), one.change(before, self._std), before)
        return features.index_copy(1, torch.tensor([one.feature], device=features.device), after[:, None])

    def _call(self, one: Intervene, layer: int, features: Tensor) -> Tensor:
        """A user's function, on `[row, position, feature]`."""
        shaped = features.view(self._passes.n_rows, -1, features.shape[1])
        changed = one(layer, shaped)
        if not isinstance(changed, Tensor) or changed.shape != shaped.shape:
            got = tuple(changed.shape) if isinstance(changed, Tensor) else changed
            raise ConfigError(
                f"The intervention function returned {got} at layer {layer} instead of the features "
                f"{tuple(shaped.shape)} [row, position, feature]. Let it end with `return features`."
            )
        return changed.reshape(features.shape)


def _check_exists(one: Intervention, widths: Sequence[int], what: str) -> None:
    if one.layer >= len(widths):
        raise ConfigError(f"{one.name}: there are {len(widths)} layers, 0 to {len(widths) - 1}.")
    if one.feature >= widths[one.layer]:
        raise ConfigError(
            f"{one.name}: layer {one.layer} has {widths[one.layer]:,} {what}s, 0 to {widths[one.layer] - 1}."
        )


def _check_unit(one: Intervention, std: Tensor | None, what: str) -> None:
    if one.unit != "std":
        return
    if std is None:
        raise ConfigError(
            f"{one.name} is in standard deviations, but those of the {what}s are not known. Give feature_std= "
            "[layer, feature] (`clt.replacement.feature_std` measures it), or give the value in activations."
        )
    if not float(std[one.layer, one.feature]) > 0:
        raise ConfigError(
            f"{one.name} is in standard deviations, but this {what}'s is {float(std[one.layer, one.feature])}: it was "
            "never on where it was measured. Give the value in activations."
        )
