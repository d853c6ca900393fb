"""Paired bootstrap of a benchmark's metrics: the same images resampled for both answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from clt.benchmarks.base import Benchmark, Report
from clt.errors import DiscoveryError

N_RESAMPLES = 1000


class PairedScores:
    """Counts of the answers before and after, image by image."""

    def __init__(
        self, benchmark: Benchmark, images: Mapping[str, str], n_resamples: int = N_RESAMPLES, seed: int = 0
    ) -> None:
        """Draw the resamples once, so that every comparison uses the same ones.

        Args:
            images: the image of each sample id; all questions about one are drawn together.
        """
        self._benchmark = benchmark
        self._images = images
        names = sorted(set(images.values()))
        self._group = {name: place for place, name in enumerate(names)}
        rng = np.random.default_rng(seed)
        self._weights: Int64[np.ndarray, "resample image"] = rng.multinomial(
            len(names), np.full(len(names), 1 / len(names)), size=n_resamples
        )

    def metrics(self, report: Report) -> dict[str, float]:
        """The benchmark's numbers."""
        return dict(report.metrics)

    def changes(self, before: Report, after: Report) -> dict[str, dict[str, float | list[float]]]:
        """Per metric the change after - before, and the middle 95 % of its resamples.

        Raises:
            DiscoveryError: the two score different samples.
        """
        if [score.id for score in before.scores] != [score.id for score in after.scores]:
            raise DiscoveryError("A paired comparison needs the same samples before and after.")
        first, second = self._resampled(before), self._resampled(after)
        changes: dict[str, dict[str, float | list[float]]] = {}
        for name, value in after.metrics.items():
            draws = np.array([two[name] - one[name] for one, two in zip(first, second)])
            interval = np.quantile(draws, [0.025, 0.975]).tolist()
            changes[name] = {"value": float(value - before.metrics[name]), "interval": interval}
        return changes

    def _resampled(self, report: Report) -> Sequence[dict[str, float]]:
        """The metrics of every resample."""
        names = list(dict.fromkeys(name for score in report.scores for name in score.counts))
        sums: Float64[np.ndarray, "image count"] = np.zeros((len(self._group), len(names)))
        for score in report.scores:
            row = self._group[self._images[score.id]]
            sums[row] += [score.counts.get(name, 0) for name in names]
        totals = self._weights @ sums
        return [self._benchmark.metrics(dict(zip(names, row))) for row in totals.tolist()]
