"""What tells GOOD from BAD: the phase guide's scores, and whether a difference is more than chance.

    frequency_ratio  = good_freq / (bad_freq + epsilon)
    activation_ratio = good_avg / (bad_avg + epsilon)
    goodness_score   = frequency_ratio * good_avg

`good_freq` is the share of GOOD samples in which a feature is active at a counted position, `good_avg` its mean
activation over those samples.

Permutation test: a feature's statistic is the sum of its strengths over GOOD samples, less what shuffling the labels
within strata would give on average, in units of that shuffling's standard deviation (both have closed forms). The
null is drawn by shuffling; features active in about as many samples share their draws, so that a hundred
shuffles resolve p-values far below a hundredth. Benjamini and Hochberg 1995 turn them into q-values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, Shaped
from torch.nn.functional import embedding_bag

from clt.discovery.table import FeatureTable, LayerTable

PER_FEATURE = Float64[np.ndarray, "layer feature"]


@dataclass(frozen=True)
class ClassStatistics:
    """Frequencies and strengths per layer and feature, and the guide's scores from them."""

    good_freq: PER_FEATURE
    bad_freq: PER_FEATURE
    good_avg: PER_FEATURE
    bad_avg: PER_FEATURE
    epsilon: float

    @property
    def frequency_ratio(self) -> PER_FEATURE:
        """good_freq / (bad_freq + epsilon)."""
        return self.good_freq / (self.bad_freq + self.epsilon)

    @property
    def activation_ratio(self) -> PER_FEATURE:
        """good_avg / (bad_avg + epsilon)."""
        return self.good_avg / (self.bad_avg + self.epsilon)

    @property
    def goodness_score(self) -> PER_FEATURE:
        """frequency_ratio * good_avg."""
        return self.frequency_ratio * self.good_avg


def class_statistics(table: FeatureTable, is_good: Bool[np.ndarray, " sample"], epsilon: float) -> ClassStatistics:
    """Both classes' frequencies and strengths."""
    return ClassStatistics(
        good_freq=table.frequency(is_good),
        bad_freq=table.frequency(~is_good),
        good_avg=table.mean_strength(is_good),
        bad_avg=table.mean_strength(~is_good),
        epsilon=epsilon,
    )


@dataclass(frozen=True)
class Significance:
    """The permutation test per layer and feature."""

    z: PER_FEATURE
    """Above 0: stronger in GOOD. 0 where the feature was not tested."""
    p_value: PER_FEATURE
    q_value: PER_FEATURE
    """The least share of false discoveries at which the feature would be among them; 1 where it was not tested."""
    n_tested: int


def permutation_test(
    table: FeatureTable,
    is_good: Bool[np.ndarray, " sample"],
    strata: Int64[np.ndarray, " sample"],
    *,
    n_permutations: int = 100,
    min_active: int = 5,
    seed: int = 0,
) -> Significance:
    """Two-sided permutation p and Benjamini-Hochberg q of each feature.

    Args:
        strata: labels are exchanged only among samples of the same stratum (answer class, length).
        min_active: features active in fewer samples are not tested: nothing could be said of them.
    """
    labels = _shuffled(is_good, strata, n_permutations, seed)
    first = next(iter(table.layers.values()))
    zeros = np.zeros((len(table.layers), table.n_features))
    z, n_active = zeros.copy(), zeros.copy()
    null = _PooledNull()
    for place, layer in enumerate(table.layers.values()):
        all_z, active = _standardised(layer, labels, strata, table.n_features)
        tested = active >= min_active
        z[place], n_active[place] = np.where(tested, all_z[:, 0], 0), np.where(tested, active, 0)
        null.add(active[tested], all_z[tested, 1:])
    del first
    tested = n_active > 0
    p = np.ones_like(z)
    p[tested] = null.p_values(n_active[tested], z[tested])
    q = np.ones_like(z)
    q[tested] = benjamini_hochberg(p[tested])
    return Significance(z, p, q, int(tested.sum()))


def benjamini_hochberg(p_values: Float64[np.ndarray, " test"]) -> Float64[np.ndarray, " test"]:
    """The q-value of each test: min over p' >= p of p' * n / rank(p').

    Source: Benjamini and Hochberg 1995, "Controlling the False Discovery Rate".
    """
    order = np.argsort(p_values)[::-1]
    n = len(p_values)
    scaled = p_values[order] * n / np.arange(n, 0, -1)
    q = np.empty(n)
    q[order] = np.minimum.accumulate(scaled).clip(max=1)
    return q


def make_strata(
    *columns: Sequence[Shaped[np.ndarray, " sample"]] | Shaped[np.ndarray, " sample"],
) -> Int64[np.ndarray, " sample"]:
    """One number per combination of the columns' values."""
    if not columns:
        raise ValueError("make_strata needs a column; give one of zeros for a single stratum.")
    codes = [np.unique(np.asarray(column), return_inverse=True)[1] for column in columns]
    return np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def length_bins(lengths: Sequence[int], n_bins: int = 4) -> Int64[np.ndarray, " sample"]:
    """Answer lengths as quantile bins; equal lengths share a bin."""
    values = np.asarray(lengths)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, n_bins + 1)[1:-1], method="higher"))
    return np.searchsorted(edges, values, side="left").astype(np.int64)


def _shuffled(
    is_good: Bool[np.ndarray, " sample"], strata: Int64[np.ndarray, " sample"], n: int, seed: int
) -> Float32[np.ndarray, "sample draw"]:
    """The labels (first column) and their shuffles within strata, less each stratum's mean."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(is_good[:, None].astype(np.float32), n + 1, axis=1)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        labels[members, 1:] = rng.permuted(labels[members, 1:], axis=0)
        labels[members] -= labels[members].mean(axis=0)
    return labels


def _standardised(
    layer: LayerTable, labels: Float32[np.ndarray, "sample draw"], strata: Int64[np.ndarray, " sample"], n_features: int
) -> tuple[Float64[np.ndarray, "feature draw"], Int64[np.ndarray, " feature"]]:
    """Each feature's statistic under each labelling, and in how many samples it is active."""
    bounds = np.searchsorted(layer.features, np.arange(n_features + 1))
    sums = embedding_bag(
        torch.from_numpy(layer.samples.astype(np.int64)),
        torch.from_numpy(labels),
        torch.from_numpy(bounds),
        mode="sum",
        per_sample_weights=torch.from_numpy(layer.strength),
        include_last_offset=True,
    ).numpy()
    variance = _shuffling_variance(layer, labels[:, 0], strata, n_features)
    z = np.divide(sums, np.sqrt(variance)[:, None], out=np.zeros_like(sums), where=variance[:, None] > 1e-12)
    return z.astype(np.float64), np.diff(bounds)


def _shuffling_variance(
    layer: LayerTable, centred: Float32[np.ndarray, " sample"], strata: Int64[np.ndarray, " sample"], n_features: int
) -> PER_FEATURE | Float64[np.ndarray, " feature"]:
    """Variance of the statistic over all shuffles within strata.

    In a stratum of n samples with centred labels c, sum c x has variance sum c^2 * sum (x - mean x)^2 / (n - 1).
    """
    total = np.zeros(n_features)
    strength = layer.strength.astype(np.float64)
    for stratum in np.unique(strata):
        members = strata == stratum
        n = int(members.sum())
        labels = float(np.square(centred[members]).sum())
        if n < 2 or labels == 0:
            continue
        inside = members[layer.samples]
        features, x = layer.features[inside], strength[inside]
        first = np.bincount(features, weights=x, minlength=n_features)
        second = np.bincount(features, weights=x * x, minlength=n_features)
        total += labels * (second - first * first / n).clip(min=0) / (n - 1)
    return total


class _PooledNull:
    """Draws of |z| under shuffled labels, pooled over features active in about as many samples (powers of two)."""

    def __init__(self) -> None:
        self._draws: dict[int, list[Float32[np.ndarray, " draw"]]] = {}

    def add(self, n_active: Int64[np.ndarray, " feature"], z: Float64[np.ndarray, "feature draw"]) -> None:
        """Take one layer's tested features."""
        bins = _activity_bins(n_active)
        for each in np.unique(bins):
            self._draws.setdefault(int(each), []).append(np.abs(z[bins == each]).astype(np.float32).ravel())

    def p_values(
        self, n_active: Float64[np.ndarray, " feature"], z: Float64[np.ndarray, " feature"]
    ) -> Float64[np.ndarray, " feature"]:
        """Share of the pooled draws at least as large, the observed one counted in."""
        p = np.ones(len(z))
        bins = _activity_bins(n_active)
        for each in np.unique(bins):
            draws = np.sort(np.concatenate(self._draws[int(each)]))
            here = bins == each
            # Observed values get the draws' precision, so that equal statistics compare as equal.
            observed = np.abs(z[here]).astype(np.float32)
            p[here] = (len(draws) - np.searchsorted(draws, observed, side="left") + 1) / (len(draws) + 1)
        return p


def _activity_bins(n_active: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(n_active, 1)).astype(np.int64)
