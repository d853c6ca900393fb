"""Choosing features by turns over layers, never greedily; and halves, to judge on other images than one chose by."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from clt.errors import ConfigError
from clt.types import FeatureId

Half = Literal["selection", "report"]


def round_robin(
    scores: Float64[np.ndarray, "layer feature"],
    eligible: Bool[np.ndarray, "layer feature"],
    *,
    target: int,
    min_per_layer: int,
    layers: Sequence[int] | None = None,
) -> list[FeatureId]:
    """The best remaining feature of each layer in turn until `target` are chosen, best first.

    Args:
        scores: higher is better.
        eligible: features that may be chosen; a layer that runs out is passed over.
        target: how many in all, if there are as many.
        min_per_layer: every layer gives at least as many as it has of these.
        layers: the layers' own numbers; None: 0, 1, ...

    Raises:
        ConfigError: `target` is too small for `min_per_layer`.
    """
    n_layers = len(scores)
    if target < n_layers * min_per_layer:
        raise ConfigError(
            f"target-features = {target} is less than min-per-layer = {min_per_layer} for each of {n_layers} layers. "
            f"Raise the first to at least {n_layers * min_per_layer}, or lower the second to {target // n_layers}."
        )
    numbers = range(n_layers) if layers is None else layers
    queues = [_ranked(row, can) for row, can in zip(scores, eligible)]
    longest = max((len(queue) for queue in queues), default=0)
    rounds = (
        (place, queue[turn]) for turn in range(longest) for place, queue in enumerate(queues) if turn < len(queue)
    )
    chosen = [(place, feature) for _, (place, feature) in zip(range(target), rounds)]
    chosen.sort(key=lambda pair: -scores[pair])
    return [FeatureId(numbers[place], int(feature)) for place, feature in chosen]


def layer_distribution(chosen: Sequence[FeatureId]) -> dict[str, int]:
    """How many features each layer gave, keys as the phase guide writes them."""
    counts = Counter(feature.layer for feature in chosen)
    return {str(layer): counts[layer] for layer in sorted(counts)}


def half_of(image: str, seed: int) -> Half:
    """Which half an image belongs to: a fair coin that depends on nothing but the image and the seed.

    All questions about an image fall into the same half.
    """
    digest = hashlib.sha256(f"{seed}:{image}".encode()).digest()
    return "selection" if digest[0] < 128 else "report"


def _ranked(scores: Float64[np.ndarray, " feature"], eligible: Bool[np.ndarray, " feature"]) -> np.ndarray:
    """Eligible features, best first; equal scores in the order of their numbers."""
    features = np.flatnonzero(eligible)
    return features[np.argsort(-scores[features], kind="stable")]
