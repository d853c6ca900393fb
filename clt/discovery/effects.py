"""Gradient x activation: how much each feature pushes towards BAD answers, and how much towards GOOD ones.

A *span* is a piece of an answer that is good or bad: a yes or no, an object that is there or is invented. Its margin
is the log-odds log(P / (1 - P)) of the probability P that the model writes this span after what comes before. The
effect of a feature on a span is the derivative of the margin by a factor on the feature at all positions, at factor
1: sum over positions of activation times d margin / d activation. Unlike a log-probability the margin does not
saturate where the model is sure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Integer
from torch import Tensor

from clt.discovery.statistics import benjamini_hochberg
from clt.errors import DiscoveryError
from clt.lm import HostInputs
from clt.replacement.steerable import Steerable
from clt.types import Sample

PER_FEATURE = Float64[np.ndarray, "layer feature"]

# A word of the answer is taken for a mention if it begins like the mention's dictionary form.
_SHORTEST_STEM = 3


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` of an answer, and whether they are what should not be said."""

    start: int
    end: int
    is_bad: bool


@dataclass(frozen=True)
class Example:
    """An answer as it was given, cut into good and bad spans."""

    sample: Sample
    answer: Integer[Tensor, " _position"]
    spans: tuple[Span, ...]


def spans_of(details: Mapping[str, Any], is_bad: bool, pieces: Sequence[str]) -> tuple[Span, ...]:
    """The spans of one answer.

    Where the benchmark names the objects an answer mentions (`mentioned`, in order) and which of them it invents
    (`invented`), each mention's span runs from the end of the mention before it, so that it holds the decision to go
    on as well as the word. Otherwise the whole answer is one span.

    Args:
        details: of the sample's score.
        is_bad: the verdict on the whole answer.
        pieces: the answer's tokens as text.
    """
    if not details.get("mentioned"):
        return (Span(0, len(pieces), is_bad),) if pieces else ()
    invented = set(details.get("invented", ()))
    ends = np.cumsum([len(piece) for piece in pieces])
    text = "".join(pieces).lower()
    spans, token, place = [], 0, 0
    for word in details["mentioned"]:
        found = _find(text, word.lower(), place)
        if found is None:
            continue
        place = found
        end = int(np.searchsorted(ends, place, side="left")) + 1
        if end > token:
            spans.append(Span(token, end, word in invented))
            token = end
    return tuple(spans)


def _find(text: str, word: str, start: int) -> int | None:
    """Where the next word that begins like `word` ends."""
    stem = word[: max(_SHORTEST_STEM, len(word) - 2)]
    match = re.compile(rf"\b{re.escape(stem)}\w*").search(text, start)
    return match.end() if match else None


def span_margins(
    logits: Float[Tensor, "row position vocabulary"], inputs: HostInputs, spans: Sequence[Sequence[Span]]
) -> list[tuple[Float[Tensor, ""], bool]]:
    """The margin of every span of a batch, and whether it is bad.

    Args:
        logits: after each position, of prompts with answers, padded right.
        spans: of each row's answer.
    """
    log_p = logits.float().log_softmax(dim=-1)
    margins = []
    for row, own in enumerate(spans):
        places = inputs.answer[row].nonzero().squeeze(1)
        for span in own:
            at = places[span.start : span.end]
            total = log_p[row, at - 1, inputs.input_ids[row, at]].sum()
            # log P - log(1 - P); P is kept off 1, where the host is surer than its numbers can tell.
            margins.append((total - torch.log1p(-total.exp().clamp(max=1 - 1e-6)), span.is_bad))
    return margins


@dataclass(frozen=True)
class Effects:
    """Mean effect of each feature on bad and on good spans, and whether they differ by more than chance."""

    bad: PER_FEATURE
    good: PER_FEATURE
    p_value: PER_FEATURE
    """Welch's test of bad against good over answers, normal approximation."""
    q_value: PER_FEATURE
    n_bad: int
    n_good: int

    @property
    def selective(self) -> PER_FEATURE:
        """Effect on bad spans less that on good ones: above 0 for features to turn down."""
        return self.bad - self.good

    def at(self, place: tuple[int, int]) -> dict[str, Any]:
        """One feature's numbers for a file."""
        fields = {"effect_bad": self.bad, "effect_good": self.good, "effect": self.selective}
        fields |= {"effect_p_value": self.p_value, "effect_q_value": self.q_value}
        values: dict[str, Any] = {name: float(each[place]) for name, each in fields.items()}
        return {**values, "direction": "harmful" if self.selective[place] > 0 else "helpful"}


class Gains:
    """Multiplies every feature by its row's factor; as a plain callable it is an intervention."""

    def __init__(self, factors: Float[Tensor, "layer row feature"]) -> None:
        self._factors = factors

    def __call__(self, layer: int, features: Tensor) -> Tensor:
        """The features of one layer, `[row, position, feature]`, times their factors."""
        return features * self._factors[layer][:, None].to(features)


def forward(
    model: Steerable, inputs: HostInputs, gains: Float[Tensor, "layer row feature"]
) -> Float[Tensor, "row position vocabulary"]:
    """Logits of a prompt with its answer, differentiable by the gains."""
    with model.active(inputs, interventions=Gains(gains)):
        return model.adapter.model(**inputs.tensors, use_cache=False).logits


def feature_effects(
    model: Steerable, examples: Sequence[Example], n_layers: int, n_features: int, batch_size: int = 16
) -> Effects:
    """Gradient x activation of all features over all spans.

    Raises:
        DiscoveryError: there is no bad or no good span.
    """
    sums = {label: _Moments(n_layers, n_features) for label in (True, False)}
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        for label, per_row, counts in _row_effects(model, batch, n_layers, n_features):
            sums[label].add(per_row, counts)
    bad, good = sums[True], sums[False]
    if not bad.n or not good.n:
        raise DiscoveryError(
            f"{bad.n} answers have a bad span and {good.n} a good one; gradient scores compare the two. Use more "
            "samples, or --score goodness."
        )
    error = np.sqrt(bad.error_squared() + good.error_squared())
    difference = bad.mean() - good.mean()
    z = np.divide(difference, error, out=np.zeros_like(error), where=error > 0)
    p = torch.erfc(torch.from_numpy(np.abs(z)) / math.sqrt(2)).numpy()
    is_touched = error > 0
    q = np.ones_like(p)
    q[is_touched] = benjamini_hochberg(p[is_touched])
    return Effects(bad.mean(), good.mean(), p, q, bad.n, good.n)


def _row_effects(
    model: Steerable, batch: Sequence[Example], n_layers: int, n_features: int
) -> list[tuple[bool, Tensor, Bool[Tensor, " row"]]]:
    """For bad and good spans: each row's mean effect `[layer, row, feature]`, and which rows have such spans."""
    inputs = model.adapter.prepare([each.sample for each in batch], answers=[each.answer for each in batch])
    gains = torch.ones(n_layers, len(batch), n_features, device=model.adapter.device, requires_grad=True)
    logits = forward(model, inputs, gains)
    found = []
    for label in (True, False):
        own = [[span for span in each.spans if span.is_bad == label] for each in batch]
        margins = span_margins(logits, inputs, own)
        if not margins:
            continue
        # Each row's spans weigh one together, so that long answers do not count for more.
        weights = [1 / len(spans) for spans in own for _ in spans]
        total = torch.stack([margin * weight for (margin, _), weight in zip(margins, weights)]).sum()
        (gradient,) = torch.autograd.grad(total, gains, retain_graph=label)
        found.append((label, gradient, torch.tensor([bool(spans) for spans in own])))
    return found


class _Moments:
    """Running mean and variance per feature over answers."""

    def __init__(self, n_layers: int, n_features: int) -> None:
        self.n = 0
        self._sum = np.zeros((n_layers, n_features))
        self._squares = np.zeros((n_layers, n_features))

    def add(self, values: Float[Tensor, "layer row feature"], chosen: Bool[Tensor, " row"]) -> None:
        values = values.double().cpu()[:, chosen]
        self.n += values.shape[1]
        self._sum += values.sum(1).numpy()
        self._squares += values.square().sum(1).numpy()

    def mean(self) -> PER_FEATURE:
        return self._sum / max(self.n, 1)

    def error_squared(self) -> PER_FEATURE:
        """Variance of the mean."""
        return (self._squares / self.n - self.mean() ** 2).clip(min=0) / max(self.n - 1, 1)
