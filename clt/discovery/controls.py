"""Matched controls: random features that fire about as often and as strongly as the chosen ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float64

from clt.errors import DiscoveryError
from clt.types import FeatureId

CANDIDATES = 20
"""A control is one of so many nearest neighbours in frequency and strength."""


def matched_controls(
    chosen: Sequence[FeatureId],
    frequency: Float64[np.ndarray, "layer feature"],
    strength: Float64[np.ndarray, "layer feature"],
    excluded: Collection[FeatureId],
    seed: int,
) -> list[FeatureId]:
    """For each chosen feature another one of the same layer, no two alike.

    Args:
        frequency: share of samples in which a feature is active.
        strength: its mean activation there.
        excluded: features that are no controls, the chosen ones among them.
        seed: of the draw.

    Raises:
        DiscoveryError: a layer has too few other active features.
    """
    rng = np.random.default_rng(seed)
    taken = {*excluded, *chosen}
    controls = []
    for feature in chosen:
        distance = _distance(frequency[feature.layer], strength[feature.layer], feature.feature)
        order = [FeatureId(feature.layer, int(other)) for other in np.argsort(distance) if np.isfinite(distance[other])]
        free = [other for other in order if other not in taken][:CANDIDATES]
        if not free:
            raise DiscoveryError(
                f"Layer {feature.layer} has no active feature left to be the control of {feature.layer}:"
                f"{feature.feature}. Steer with fewer features."
            )
        controls.append(free[int(rng.integers(len(free)))])
        taken.add(controls[-1])
    return controls


def _distance(
    frequency: Float64[np.ndarray, " feature"], strength: Float64[np.ndarray, " feature"], feature: int
) -> Float64[np.ndarray, " feature"]:
    """In log frequency and log strength; infinite for features that are never active."""
    active = (frequency > 0) & (strength > 0)
    with np.errstate(divide="ignore"):
        logs = np.log(np.stack([frequency, strength]))
    if not active[feature]:
        # Nothing to match: any active feature will do.
        return np.where(active, 0.0, np.inf)
    gap = np.abs(logs[:, active] - logs[:, [feature]]).sum(0)
    distance = np.full(len(frequency), np.inf)
    distance[active] = gap
    return distance
