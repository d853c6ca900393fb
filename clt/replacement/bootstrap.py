"""Intervals for ratios of sums, by resampling whole samples (positions within a sample are not independent)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

# Resamples weighed at a time: bounds memory at this many rows of one weight per sample.
_BLOCK = 100


@dataclass(frozen=True)
class Measure:
    """A number with its 95 % bootstrap interval and the number of things it was measured on."""

    value: float
    interval: tuple[float, float]
    n: int
    """Positions; samples for shares of samples."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `json.dump` takes them."""
        return {"value": self.value, "interval": list(self.interval), "n": self.n}


class Resampled:
    """Sums over samples: those of the sample at hand, and those of many resamples of it."""

    def __init__(self, per_sample: dict[str, Float64[Tensor, " sample"]], n_resamples: int, seed: int) -> None:
        """Draw the resamples, samples with replacement, the same for all sums."""
        self._names = list(per_sample)
        columns = torch.stack(list(per_sample.values()), dim=1)
        blocks = [weights @ columns for weights in _weights(len(columns), n_resamples, seed)]
        self._sums = torch.cat([columns.sum(0, keepdim=True), *blocks])

    def total(self, name: str) -> Float64[Tensor, " resample"]:
        """The sum itself (first) and in each resample."""
        return self._sums[:, self._names.index(name)]

    def ratio(
        self, numerator: Float64[Tensor, " resample"], denominator: Float64[Tensor, " resample"], n: str
    ) -> Measure | None:
        """numerator / denominator with the middle 95 % of its resamples; None where the denominator is 0.

        Args:
            n: name of the sum that counts what was measured.
        """
        if denominator[0] == 0:
            return None
        values = (numerator / denominator)[denominator != 0]
        low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
        return Measure(float(values[0]), (low, high), round(float(self.total(n)[0])))


def _weights(n_samples: int, n_resamples: int, seed: int) -> Iterator[Float64[Tensor, "resample sample"]]:
    """How often each sample occurs in each resample."""
    rng = np.random.default_rng(seed)
    chances = np.full(n_samples, 1 / n_samples)
    for start in range(0, n_resamples, _BLOCK):
        counts = rng.multinomial(n_samples, chances, size=min(_BLOCK, n_resamples - start))
        yield torch.from_numpy(counts.astype(np.float64))
