"""Feature examples: where each feature fires most, with the text around it and the patches of the image.

Written one JSON file per feature in the public feature-example format (circuit-tracer's `feature_models.Model`; a
file is named by the Cantor number of layer and feature), with the vision-language fork's additions per example.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from clt.config.base import write_text_atomically
from clt.discovery.features_file import LayerFeatures
from clt.types import FeatureId

HISTOGRAM_BINS = 20
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Peak:
    """One sample's activations of one feature."""

    sample: int
    """Number of the sample."""
    activation: float
    """The largest."""
    values: Float32[np.ndarray, " position"]
    """At every position of the sample."""


class TopExamples:
    """Keeps the strongest samples per feature while samples stream by; memory is features x `per_feature` samples."""

    def __init__(self, features: Sequence[FeatureId], per_feature: int) -> None:
        """Nothing seen yet."""
        self._per_feature = per_feature
        self._heaps: dict[FeatureId, list[tuple[float, int, Peak]]] = {feature: [] for feature in features}
        self._counts = dict.fromkeys(features, 0)
        self._peaks: dict[FeatureId, list[float]] = {feature: [] for feature in features}
        self._n_tokens = 0

    def add(self, number: int, layers: Mapping[int, LayerFeatures]) -> None:
        """Look at one sample."""
        self._n_tokens += next(iter(layers.values())).n_positions
        for feature, heap in self._heaps.items():
            layer = layers[feature.layer]
            start, end = np.searchsorted(layer.features, [feature.feature, feature.feature + 1])
            if start == end:
                continue
            values = layer.values[start:end]
            self._counts[feature] += int(end - start)
            largest = float(values.max())
            self._peaks[feature].append(largest)
            if len(heap) == self._per_feature and largest <= heap[0][0]:
                continue
            everywhere = np.zeros(layer.n_positions, dtype=np.float32)
            everywhere[layer.positions[start:end]] = values
            entry = (largest, -number, Peak(number, largest, everywhere))
            (heapq.heappushpop if len(heap) == self._per_feature else heapq.heappush)(heap, entry)

    def top(self, feature: FeatureId) -> list[Peak]:
        """The strongest samples, strongest first; of equal ones the first seen."""
        return [peak for _, _, peak in sorted(self._heaps[feature], key=lambda entry: entry[:2], reverse=True)]

    def firing_count(self, feature: FeatureId) -> int:
        """At how many positions it fired."""
        return self._counts[feature]

    def frequency(self, feature: FeatureId) -> float:
        """Share of all positions at which it fired."""
        return self._counts[feature] / max(self._n_tokens, 1)

    def peaks(self, feature: FeatureId) -> list[float]:
        """Its largest activation in every sample where it fired."""
        return self._peaks[feature]


@dataclass(frozen=True)
class Shown:
    """What can be shown of a sample: its tokens, which of them are patches of the image, and what it is about."""

    id: str
    tokens: Sequence[str]
    image_positions: Sequence[int]
    image: str
    response: str
    is_good: bool | None


def feature_json(
    feature: FeatureId,
    top: TopExamples,
    shown: Callable[[int], Shown],
    *,
    transcoder_id: str,
    top_logits: Sequence[str] = (),
    bottom_logits: Sequence[str] = (),
) -> dict[str, Any]:
    """The public format, fields as circuit-tracer's page reads them."""
    peaks = top.peaks(feature)
    histogram, _ = np.histogram(peaks, HISTOGRAM_BINS) if peaks else (np.zeros(HISTOGRAM_BINS), None)
    examples = [_example(peak, shown(peak.sample)) for peak in top.top(feature)]
    return {
        "transcoder_id": transcoder_id,
        "index": feature.number,
        "layer": feature.layer,
        "feature": feature.feature,
        "firing_count": top.firing_count(feature),
        "examples_quantiles": [{"quantile_name": "Top activations", "examples": examples}],
        "top_logits": list(top_logits),
        "bottom_logits": list(bottom_logits),
        "act_min": 0.0,
        "act_max": max(peaks, default=0.0),
        "quantile_values": [float(value) for value in np.quantile(peaks, QUANTILES)] if peaks else [],
        "histogram": [float(count) for count in histogram],
        "activation_frequency": top.frequency(feature),
    }


def write_examples(folder: Path, features: Iterable[Mapping[str, Any]]) -> int:
    """One file per feature; returns how many."""
    number = 0
    for content in features:
        write_text_atomically(folder / f"{content['index']}.json", json.dumps(content, ensure_ascii=False) + "\n")
        number += 1
    return number


def _example(peak: Peak, shown: Shown) -> dict[str, Any]:
    patches = [float(peak.values[place]) for place in shown.image_positions]
    return {
        "tokens": list(shown.tokens),
        "tokens_acts_list": [round(float(value), 5) for value in peak.values],
        "train_token_ind": int(peak.values.argmax()),
        "is_repeated_datapoint": False,
        "activation": peak.activation,
        "example_id": shown.id,
        "image_references": [{"image": shown.image, "patch_activations": patches}] if patches else [],
        "metadata": {"response": shown.response, "is_good": shown.is_good},
    }
