"""Phase 7: turn features up and down while the model answers, and see what the benchmark says.

`harmful` features push towards BAD answers and are scaled by 1 - dose, `helpful` ones by 1 + dose: at dose 1 the
harmful are ablated and the helpful doubled. Every dose is compared with draws of matched random features treated in
the same way. Answers, before and after, are given to images that had no part in choosing the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clt.benchmarks.base import Benchmark, Report
from clt.discovery.bootstrap import PairedScores
from clt.discovery.effects import Gains
from clt.replacement.intervention import Interventions
from clt.replacement.steerable import Steerable
from clt.types import FeatureId, Sample

Where = Literal["replacement", "host", "neurons"]
Factors = Mapping[FeatureId, float]
"""What to multiply each feature (or neuron) by; the others stay."""


@dataclass(frozen=True, kw_only=True)
class Steered:
    """One way of steering and what it changed, against its controls."""

    name: str
    """What was steered: `chosen`, `seed_score`, `learned`."""
    where: Where
    dose: float
    metrics: Mapping[str, float]
    changes: Mapping[str, Mapping[str, Any]]
    """Metric -> change and its paired 95 % interval."""
    controls: Mapping[str, Sequence[float]]
    """Metric -> change by each draw of matched random features."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with mean and standard deviation of the controls."""
        summary = {name: summarised(values) for name, values in self.controls.items()}
        own = {"name": self.name, "where": self.where, "dose": self.dose, "metrics": dict(self.metrics)}
        return {**own, "changes": {name: dict(each) for name, each in self.changes.items()}, "controls": summary}


def summarised(values: Sequence[float]) -> dict[str, Any]:
    """Draws with their mean and standard deviation."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"draws": list(values), "mean": float(np.mean(values)), "std": spread}


def dose_factors(harmful: Sequence[FeatureId], helpful: Sequence[FeatureId], dose: float) -> dict[FeatureId, float]:
    """Harmful features times 1 - dose, helpful ones times 1 + dose."""
    return {**dict.fromkeys(harmful, 1 - dose), **dict.fromkeys(helpful, 1 + dose)}


def swapped(factors: Factors, chosen: Sequence[FeatureId], controls: Sequence[FeatureId]) -> dict[FeatureId, float]:
    """The same factors on the controls."""
    return {control: factors[feature] for feature, control in zip(chosen, controls, strict=True)}


class FixedGains(Gains):
    """The same factors for every row, as an intervention."""

    def __init__(self, factors: Factors, widths: Sequence[int]) -> None:
        """Factors by layer; layers without any are left alone."""
        self._by_layer: dict[int, Float[Tensor, " feature"]] = {}
        for (layer, feature), factor in factors.items():
            row = self._by_layer.setdefault(layer, torch.ones(widths[layer]))
            row[feature] = factor

    def __call__(self, layer: int, features: Tensor) -> Tensor:
        """The features of one layer, times their factors."""
        if layer not in self._by_layer:
            return features
        return features * self._by_layer[layer].to(features)


class Trial:
    """Asks the held-out questions under an intervention and scores the answers."""

    def __init__(
        self,
        benchmark: Benchmark,
        samples: Sequence[Sample],
        images: Mapping[str, str],
        *,
        max_new_tokens: int,
        batch_size: int,
        expected_lengths: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        """The samples are those of the report half, as the host is to see them.

        Args:
            expected_lengths: tokens of each sample's answer without steering; answers of about the same length run
                together, so that short ones do not wait for long ones.
        """
        samples = sorted(samples, key=lambda sample: expected_lengths[sample.id])
        self._benchmark, self._samples = benchmark, samples
        self._options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        self._pairs = PairedScores(benchmark, {sample.id: images[sample.id] for sample in samples}, seed=seed)
        self._before: dict[Where, Report] = {}

    def score(self, model: Steerable, interventions: Interventions | None) -> Report:
        """The benchmark's report on the answers."""
        answers = model.generate(self._samples, interventions=interventions, **self._options)
        return self._benchmark.score({sample.id: text.strip() for sample, text in zip(self._samples, answers)})

    def remember(self, where: Where, answers: Mapping[str, str]) -> None:
        """Answers without interventions that were given already."""
        self._before[where] = self._benchmark.score({sample.id: answers[sample.id] for sample in self._samples})

    def before(self, where: Where, model: Steerable) -> Report:
        """The report without interventions, made once; host and neurons are the same model then."""
        where = "host" if where == "neurons" else where
        if where not in self._before:
            self._before[where] = self.score(model, None)
        return self._before[where]

    def run(
        self,
        name: str,
        where: Where,
        model: Steerable,
        dose: float,
        factors: Factors,
        controls: Sequence[Factors],
        widths: Sequence[int],
        on_run: Callable[[], None] = lambda: None,
    ) -> Steered:
        """Steer, and steer each control."""
        before = self.before(where, model)
        after = self.score(model, FixedGains(factors, widths))
        on_run()
        drawn: dict[str, list[float]] = {metric: [] for metric in after.metrics}
        for control in controls:
            report = self.score(model, FixedGains(control, widths))
            on_run()
            for metric, value in report.metrics.items():
                drawn[metric].append(value - before.metrics[metric])
        return Steered(
            name=name,
            where=where,
            dose=dose,
            metrics=dict(after.metrics),
            changes=self._pairs.changes(before, after),
            controls={metric: values for metric, values in drawn.items() if values},
        )
