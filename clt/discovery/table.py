"""Which features fired how strongly in which samples: the sparse table that feature statistics are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from clt.discovery.features_file import LayerFeatures, load_features
from clt.errors import DiscoveryError

Mask = Bool[np.ndarray, " _position"]
LayerSums = tuple[Int32[np.ndarray, " entry"], Float32[np.ndarray, " entry"]]
"""Features active in one layer of one sample, and their mean activation where active."""


@dataclass(frozen=True)
class LayerTable:
    """One layer: an entry per sample and feature that is active in it at a counted position, sorted by feature."""

    samples: Int32[np.ndarray, " entry"]
    features: Int32[np.ndarray, " entry"]
    strength: Float32[np.ndarray, " entry"]
    """Mean activation over the counted positions at which the feature is active."""

    def sums(
        self, weights: Float64[np.ndarray, " sample"], values: bool, n_features: int
    ) -> Float64[np.ndarray, " feature"]:
        """For each feature, the weights of the samples it is active in, summed; times its strength if `values`."""
        weight = weights[self.samples]
        if values:
            weight = weight * self.strength
        return np.bincount(self.features, weights=weight, minlength=n_features)


@dataclass(frozen=True)
class FeatureTable:
    """All layers of all samples."""

    layers: Mapping[int, LayerTable]
    n_samples: int
    n_features: int

    def frequency(self, chosen: Bool[np.ndarray, " sample"]) -> Float64[np.ndarray, "layer feature"]:
        """Share of the chosen samples in which each feature is active."""
        weights = chosen / max(1, chosen.sum())
        return self._stack(weights, values=False)

    def mean_strength(self, chosen: Bool[np.ndarray, " sample"]) -> Float64[np.ndarray, "layer feature"]:
        """Mean strength over those of the chosen samples in which a feature is active; 0 where it never is."""
        weights = chosen.astype(np.float64)
        active = self._stack(weights, values=False)
        return self._stack(weights, values=True) / np.maximum(active, 1)

    def select(self, chosen: Bool[np.ndarray, " sample"]) -> FeatureTable:
        """The chosen samples only, numbered anew."""
        number = np.cumsum(chosen) - 1
        layers = {}
        for layer, table in self.layers.items():
            keep = chosen[table.samples]
            samples = number[table.samples[keep]].astype(np.int32)
            layers[layer] = LayerTable(samples, table.features[keep], table.strength[keep])
        return FeatureTable(layers, int(chosen.sum()), self.n_features)

    def _stack(self, weights: Float64[np.ndarray, " sample"], values: bool) -> Float64[np.ndarray, "layer feature"]:
        return np.stack([table.sums(weights, values, self.n_features) for table in self.layers.values()])


def load_table(
    files: Sequence[Path], masks: Sequence[Mask], on_sample: Callable[[], None] = lambda: None, workers: int = 2
) -> FeatureTable:
    """Read the activation files of all samples and count the positions of the masks.

    Args:
        files: one per sample.
        masks: which of its positions count; length as in the file.
        on_sample: called after each file.
        workers: threads that read and unpack.

    Raises:
        DiscoveryError: a file is unreadable, of other sizes than the others, or of another length than its mask.
    """
    builder = _Builder()
    with ThreadPoolExecutor(workers) as pool:
        for number, (path, sums) in enumerate(pool.map(_read, files, masks)):
            builder.add(number, path, *sums)
            on_sample()
    return builder.table(len(files))


def _read(path: Path, mask: Mask) -> tuple[Path, tuple[dict[int, LayerSums], int]]:
    layers = load_features(path, mask)
    widths = {each.n_features for each in layers.values()}
    if len(widths) != 1:
        raise DiscoveryError(f"{path} holds layers of {sorted(widths)} features. All must have the same number.")
    return path, ({layer: strengths(each) for layer, each in layers.items()}, widths.pop())


def strengths(layer: LayerFeatures) -> LayerSums:
    """Which features are active, and their mean activation where active."""
    if not len(layer.features):
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    features = layer.features.astype(np.int32)
    starts = np.flatnonzero(np.diff(features, prepend=-1))
    n_active = np.diff(starts, append=len(features))
    return features[starts], (np.add.reduceat(layer.values, starts) / n_active).astype(np.float32)


class _Builder:
    """Collects the samples' sums and sorts each layer by feature at the end."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[int, LayerSums]]] = {}
        self._n_features = 0

    def add(self, number: int, path: Path, layers: Mapping[int, LayerSums], n_features: int) -> None:
        if number and (n_features != self._n_features or layers.keys() != self._parts.keys()):
            raise DiscoveryError(
                f"{path} holds {len(layers)} layers of {n_features} features, the samples before it "
                f"{len(self._parts)} of {self._n_features}. They come from different transcoders; capture anew."
            )
        self._n_features = n_features
        for layer, sums in layers.items():
            self._parts.setdefault(layer, []).append((number, sums))

    def table(self, n_samples: int) -> FeatureTable:
        layers = {}
        for layer in sorted(self._parts):
            parts = self._parts.pop(layer)
            lengths = [len(features) for _, (features, _) in parts]
            samples = np.repeat(np.array([number for number, _ in parts], dtype=np.int32), lengths)
            features = np.concatenate([features for _, (features, _) in parts])
            order = np.argsort(features, kind="stable")
            strength = np.concatenate([strength for _, (_, strength) in parts])
            layers[layer] = LayerTable(samples[order], features[order], strength[order])
        return FeatureTable(layers, n_samples, self._n_features)
