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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Integer
from torch import Tensor

from clt.discovery.statistics import benjamini_hochberg
from clt.errors import DiscoveryError
from clt.lm import HostInputs
from clt.replacement import ReplacementModel
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
    task: str
    """Answers of one kind (descriptions, yes/no) are balanced among themselves and then weigh the same."""


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
    if "mentioned" not in details:
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
    if not any(spans):
        return []
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    # Of each token but the first, given what comes before it; then sums over the first k of them.
    token = log_p[:, :-1].gather(2, inputs.input_ids[:, 1:, None]).squeeze(2) * inputs.answer[:, 1:]
    sums = torch.nn.functional.pad(token.cumsum(1), (1, 0))
    first = inputs.answer.int().argmax(1).tolist()
    every = [(row, span) for row, own in enumerate(spans) for span in own]
    places = [(row, first[row] - 1 + span.start, first[row] - 1 + span.end) for row, span in every]
    rows, starts, ends = torch.tensor(places, device=sums.device).unbind(1)
    total = sums[rows, ends] - sums[rows, starts]
    # log P - log(1 - P); P is kept off 1, where the host is surer than its numbers can tell.
    margins = total - torch.log1p(-total.exp().clamp(max=1 - 1e-6))
    return list(zip(margins.unbind(), (span.is_bad for _, span in every)))


@dataclass(frozen=True)
class Effects:
    """Mean effect of each feature on bad and on good spans, and whether they differ by more than chance.

    Where there are several tasks, each task's effects are divided by its largest difference and then averaged.
    """

    bad: PER_FEATURE
    good: PER_FEATURE
    z: PER_FEATURE
    """Difference over its standard error, over answers."""
    p_value: PER_FEATURE
    """Of z, as if normal."""
    q_value: PER_FEATURE
    n_bad: int
    n_good: int

    @property
    def selective(self) -> PER_FEATURE:
        """Effect on bad spans less that on good ones: above 0 for features to turn down."""
        return self.bad - self.good

    def save(self, path: Path) -> None:
        """Keep what later phases choose by."""
        path.parent.mkdir(parents=True, exist_ok=True)
        counts = np.array([self.n_bad, self.n_good])
        arrays = {"bad": self.bad, "good": self.good, "z": self.z, "p": self.p_value, "q": self.q_value}
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, counts=counts, **arrays)

    @staticmethod
    def load(path: Path) -> Effects:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as kept:
            bad, good, z, p, q = (kept[name] for name in ("bad", "good", "z", "p", "q"))
            n_bad, n_good = kept["counts"].tolist()
            return Effects(bad, good, z, p, q, n_bad, n_good)

    def at(self, place: tuple[int, int]) -> dict[str, Any]:
        """One feature's numbers for a file."""
        fields = {"effect_bad": self.bad, "effect_good": self.good, "effect": self.selective}
        fields |= {"effect_p_value": self.p_value, "effect_q_value": self.q_value}
        values: dict[str, Any] = {name: float(each[place]) for name, each in fields.items()}
        return {**values, "direction": "harmful" if self.selective[place] > 0 else "helpful"}


class RowGains:
    """Multiplies every feature by its row's factor; as a plain callable it is an intervention."""

    def __init__(self, factors: Float[Tensor, "layer row feature"]) -> None:
        self._factors = factors

    def __call__(self, layer: int, features: Tensor) -> Tensor:
        """The features of one layer, `[row, position, feature]`, times their factors."""
        return features * self._factors[layer][:, None].to(features)


def forward(
    model: ReplacementModel, inputs: HostInputs, gains: Float[Tensor, "layer row feature"], keep_errors: bool
) -> Float[Tensor, "row position vocabulary"]:
    """Logits of prompts with their answers, differentiable by the gains."""
    errors = model.errors(inputs) if keep_errors else None
    with model.active(inputs, interventions=RowGains(gains), errors=errors):
        return model.adapter.model(**inputs.tensors, use_cache=False).logits


def feature_effects(
    model: ReplacementModel,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    keep_errors: bool = False,
    on_batch: Callable[[int], None] = lambda n: None,
) -> Effects:
    """Gradient x activation of all features over all spans.

    Args:
        keep_errors: add to each MLP output what the transcoder misses on these answers, so that the forward pass is
            the host's.
        on_batch: called with the number of answers done.

    Raises:
        DiscoveryError: there is no bad or no good span.
    """
    tasks: dict[str, list[Example]] = {}
    for each in examples:
        tasks.setdefault(each.task, []).append(each)
    if not tasks:
        raise DiscoveryError("There are no answers to compute effects on.")
    return _pooled([_task_effects(model, own, batch_size, keep_errors, on_batch) for own in tasks.values()])


def _task_effects(
    model: ReplacementModel,
    examples: Sequence[Example],
    batch_size: int,
    keep_errors: bool,
    on_batch: Callable[[int], None],
) -> Effects:
    config = model.transcoder.config
    sums = {label: _Moments(config.num_layers, config.num_features) for label in (True, False)}
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        for label, per_row, counts in _row_effects(model, batch, keep_errors):
            sums[label].add(per_row, counts)
        on_batch(len(batch))
    bad, good = sums[True], sums[False]
    if not bad.n or not good.n:
        raise DiscoveryError(
            f"Of {len(examples)} answers of one kind {bad.n} have a bad span and {good.n} a good one; gradient scores "
            "compare the two. Use more samples, or --score goodness."
        )
    error = np.sqrt(bad.error_squared() + good.error_squared())
    difference = bad.mean() - good.mean()
    z = np.divide(difference, error, out=np.zeros_like(error), where=error > 0)
    return Effects(bad.mean(), good.mean(), z, *_tested(z, error > 0), bad.n, good.n)


def _pooled(parts: Sequence[Effects]) -> Effects:
    if len(parts) == 1:
        return parts[0]
    scales = [np.abs(part.selective).max() or 1.0 for part in parts]
    bad, good = (
        np.mean([getattr(part, name) / scale for part, scale in zip(parts, scales)], axis=0) for name in ("bad", "good")
    )
    # Independent samples: z-values add up like Stouffer's.
    z = np.sum([part.z for part in parts], axis=0) / np.sqrt(len(parts))
    tested = np.any([part.p_value < 1 for part in parts], axis=0)
    return Effects(
        bad, good, z, *_tested(z, tested), sum(part.n_bad for part in parts), sum(part.n_good for part in parts)
    )


def _tested(z: PER_FEATURE, tested: Bool[np.ndarray, "layer feature"]) -> tuple[PER_FEATURE, PER_FEATURE]:
    """Two-sided p of a normal z, and q over the tested features."""
    p = torch.erfc(torch.from_numpy(np.abs(z)) / math.sqrt(2)).numpy()
    p[~tested] = 1
    q = np.ones_like(p)
    q[tested] = benjamini_hochberg(p[tested])
    return p, q


def _row_effects(
    model: ReplacementModel, batch: Sequence[Example], keep_errors: bool
) -> list[tuple[bool, Tensor, Bool[Tensor, " row"]]]:
    """For bad and good spans: each row's mean effect `[layer, row, feature]`, and which rows have such spans."""
    inputs = model.adapter.prepare([each.sample for each in batch], answers=[each.answer for each in batch])
    config = model.transcoder.config
    shape = (config.num_layers, len(batch), config.num_features)
    gains = torch.ones(shape, device=model.adapter.device, requires_grad=True)
    logits = forward(model, inputs, gains, keep_errors)
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
