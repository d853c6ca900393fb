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
from clt.replacement.intervention import Gains, Interventions
from clt.replacement.steerable import Steerable
from clt.types import FeatureId, Sample

Where = Literal["replacement", "host", "neurons"]
Factor = float | tuple[float, ...]
"""What to multiply a feature (or neuron) by, at all positions or in each of `passes.PARTS`."""
Factors = Mapping[FeatureId, Factor]
"""What to multiply each by; the others stay."""


@dataclass(frozen=True)
class Arm:
    """Factors to try, and the same on controls."""

    name: str
    dose: float
    factors: Factors
    controls: tuple[Factors, ...]
    """The same factors on matched random features."""
    learned_controls: tuple[Factors, ...] = ()
    """Of learned gains: those learned in the same way on matched random features."""


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
    """Metric -> change by each draw of matched random features with the same factors."""
    learned_controls: Mapping[str, Sequence[float]]
    """Metric -> change by each draw of matched random features with gains learned for them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with mean and standard deviation of the controls."""
        own = {"name": self.name, "where": self.where, "dose": self.dose, "metrics": dict(self.metrics)}
        drawn = {
            name: {metric: summarised(values) for metric, values in each.items()}
            for name, each in (("controls", self.controls), ("learned_controls", self.learned_controls))
        }
        return {**own, "changes": {name: dict(each) for name, each in self.changes.items()}, **drawn}


def summarised(values: Sequence[float]) -> dict[str, Any]:
    """Draws with their mean and standard deviation."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"draws": list(values), "mean": float(np.mean(values)), "std": spread}


def dose_factors(harmful: Sequence[FeatureId], helpful: Sequence[FeatureId], dose: float) -> Factors:
    """Harmful features times 1 - dose, helpful ones times 1 + dose."""
    return {**dict.fromkeys(harmful, 1 - dose), **dict.fromkeys(helpful, 1 + dose)}


def swapped(factors: Factors, chosen: Sequence[FeatureId], controls: Sequence[FeatureId]) -> Factors:
    """The same factors on the controls."""
    return {control: factors[feature] for feature, control in zip(chosen, controls, strict=True)}


def fixed_gains(factors: Factors, widths: Sequence[int]) -> Gains:
    """The factors as an intervention."""
    n_rows = max((len(factor) for factor in factors.values() if isinstance(factor, tuple)), default=1)
    by_layer: dict[int, Float[Tensor, "part feature"]] = {}
    for (layer, feature), factor in factors.items():
        table = by_layer.setdefault(layer, torch.ones(n_rows, widths[layer]))
        table[:, feature] = torch.tensor(factor)
    return Gains(by_layer)


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
        arm: Arm,
        where: Where,
        model: Steerable,
        widths: Sequence[int],
        on_run: Callable[[], None] = lambda: None,
    ) -> Steered:
        """Steer, and steer each control."""
        before = self.before(where, model)

        def steered(factors: Factors) -> Report:
            report = self.score(model, fixed_gains(factors, widths))
            on_run()
            return report

        def drawn(controls: Sequence[Factors]) -> dict[str, list[float]]:
            reports = [steered(factors).metrics for factors in controls]
            names = dict.fromkeys(name for metrics in reports for name in metrics)
            return {name: [m[name] - before.metrics[name] for m in reports if name in m] for name in names}

        after = steered(arm.factors)
        return Steered(
            name=arm.name,
            where=where,
            dose=arm.dose,
            metrics=dict(after.metrics),
            changes=self._pairs.changes(before, after),
            controls=drawn(arm.controls),
            learned_controls=drawn(arm.learned_controls),
        )
