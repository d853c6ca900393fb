"""Feature examples: where each feature fires most, with the text around it and the patches of the image.

Written one JSON file per feature in the public feature-example format (circuit-tracer's `feature_models.Model`; a
file is named by the Cantor number of layer and feature), with the vision-language fork's additions per example.
"""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer

from clt.config.base import write_text_atomically
from clt.discovery.features_file import LayerFeatures
from clt.types import FeatureId

HISTOGRAM_BINS = 20
MOST_PEAKS = 4096
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Peak:
    """One sample's activations of one feature."""

    sample: int
    """Number of the sample."""
    activation: float
    """The largest."""
    positions: Integer[np.ndarray, " active"]
    strengths: Float32[np.ndarray, " active"]
    n_positions: int

    @property
    def values(self) -> Float32[np.ndarray, " position"]:
        """At every position of the sample."""
        everywhere = np.zeros(self.n_positions, dtype=np.float32)
        everywhere[self.positions] = self.strengths
        return everywhere


class TopExamples:
    """Keeps the strongest samples per feature while samples stream by.

    Memory is features x `per_feature` samples, of each the positions at which the feature fires, and at most
    `MOST_PEAKS` numbers per feature for its histogram.
    """

    def __init__(self, features: Sequence[FeatureId] | None, per_feature: int) -> None:
        """Nothing seen yet; without `features`, all that fire are kept."""
        self._per_feature = per_feature
        self._wanted = None if features is None else list(dict.fromkeys(features))
        self._heaps: dict[FeatureId, list[tuple[float, int, Peak]]] = {}
        self._counts: Counter[FeatureId] = Counter()
        self._peaks: dict[FeatureId, list[float]] = {}
        self._n_peaks: Counter[FeatureId] = Counter()
        self._n_tokens = 0
        self._random = random.Random(0)

    def add(self, number: int, layers: Mapping[int, LayerFeatures]) -> None:
        """Look at one sample."""
        self._n_tokens += next(iter(layers.values())).n_positions
        for feature in self._fired(layers) if self._wanted is None else self._wanted:
            layer = layers[feature.layer]
            start, end = np.searchsorted(layer.features, [feature.feature, feature.feature + 1])
            if start < end:
                self._counts[feature] += int(end - start)
                self._keep(feature, number, layer, slice(int(start), int(end)))

    def _fired(self, layers: Mapping[int, LayerFeatures]) -> Iterator[FeatureId]:
        return (FeatureId(n, int(feature)) for n, layer in layers.items() for feature in np.unique(layer.features))

    def _keep(self, feature: FeatureId, number: int, layer: LayerFeatures, here: slice) -> None:
        largest = float(layer.values[here].max())
        self._keep_peak(feature, largest)
        heap = self._heaps.setdefault(feature, [])
        if len(heap) == self._per_feature and largest <= heap[0][0]:
            return
        peak = Peak(number, largest, layer.positions[here].copy(), layer.values[here].copy(), layer.n_positions)
        (heapq.heappushpop if len(heap) == self._per_feature else heapq.heappush)(heap, (largest, -number, peak))

    def _keep_peak(self, feature: FeatureId, largest: float) -> None:
        """The first `MOST_PEAKS`, then each new one in place of a random one with the chance that keeps a fair draw."""
        peaks = self._peaks.setdefault(feature, [])
        self._n_peaks[feature] += 1
        if len(peaks) < MOST_PEAKS:
            peaks.append(largest)
        elif (place := self._random.randrange(self._n_peaks[feature])) < MOST_PEAKS:
            peaks[place] = largest

    def features(self) -> list[FeatureId]:
        """Those asked for; without any, all that fired, by layer and number."""
        return sorted(self._heaps) if self._wanted is None else self._wanted

    def samples(self) -> set[int]:
        """Numbers of the samples that are kept for any feature."""
        return {peak.sample for heap in self._heaps.values() for _, _, peak in heap}

    def top(self, feature: FeatureId) -> list[Peak]:
        """The strongest samples, strongest first; of equal ones the first seen."""
        kept = self._heaps.get(feature, [])
        return [peak for _, _, peak in sorted(kept, key=lambda entry: entry[:2], reverse=True)]

    def firing_count(self, feature: FeatureId) -> int:
        """At how many positions it fired."""
        return self._counts[feature]

    def frequency(self, feature: FeatureId) -> float:
        """Share of all positions at which it fired."""
        return self._counts[feature] / max(self._n_tokens, 1)

    def peaks(self, feature: FeatureId) -> list[float]:
        """Its largest activation in every sample where it fired, or a fair draw of `MOST_PEAKS` of them."""
        return self._peaks.get(feature, [])

    def largest(self, feature: FeatureId) -> float:
        """Its largest activation of all."""
        return max((peak for peak, _, _ in self._heaps.get(feature, [])), default=0.0)


@dataclass(frozen=True)
class Shown:
    """What can be shown of a sample: its tokens, which of them are patches of the image, and what it is about."""

    id: str
    tokens: Sequence[str]
    image_positions: Sequence[int]
    image: str
    response: str
    is_good: bool | None = None


def feature_json(
    feature: FeatureId,
    top: TopExamples,
    shown: Callable[[int], Shown],
    *,
    transcoder_id: str,
    top_logits: Sequence[str] = (),
    bottom_logits: Sequence[str] = (),
    context: int | None = None,
) -> dict[str, Any]:
    """The public format, fields as circuit-tracer's page reads them.

    Args:
        context: tokens shown before the strongest one, and half as many behind it; None: the whole sample.
    """
    peaks = top.peaks(feature)
    histogram, _ = np.histogram(peaks, HISTOGRAM_BINS) if peaks else (np.zeros(HISTOGRAM_BINS), None)
    examples = [_example(peak, shown(peak.sample), context) for peak in top.top(feature)]
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
        "act_max": top.largest(feature),
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


def _example(peak: Peak, shown: Shown, context: int | None) -> dict[str, Any]:
    values = peak.values
    patches = [float(values[place]) for place in shown.image_positions]
    strongest = int(values.argmax())
    first = 0 if context is None else max(0, strongest - context)
    here = slice(first, None if context is None else strongest + context // 2 + 1)
    return {
        "tokens": list(shown.tokens[here]),
        "tokens_acts_list": [round(float(value), 5) for value in values[here]],
        "train_token_ind": strongest - first,
        "is_repeated_datapoint": False,
        "activation": peak.activation,
        "example_id": shown.id,
        "image_references": [{"image": shown.image, "patch_activations": patches}] if patches else [],
        "metadata": {"response": shown.response, "is_good": shown.is_good},
    }
