"""How faithful a replacement model is to its host, on held-out samples, with intervals.

Teacher-forced measures average over positions: before each answer token, and (as `text`) before each text token of
prompt and answer; KL and top-1 also (as `at_image`, ...) at all positions of a kind. KL(host || replacement) and cross
entropies are in nats per position.
    ce_increase      cross entropy of the replacement minus the host's
    loss_recovered   1 - ce_increase / (cross entropy with every MLP output at its mean - the host's)
    top1             share of positions where both hold the same token most probable
    top1_filtered    the same where the host is right with a probability below 0.8 (Ameisen et al. 2025)
Free-running measures compare greedy answers:
    token_match      generated tokens equal at the same index, of the longer answer's length, end token included
    identical_answers   share of samples whose whole answers are equal
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Integer
from torch import Tensor

from clt.config.base import require_positive
from clt.errors import ConfigError, HostModelError
from clt.replacement.ablation import MeanAblated, mean_outputs
from clt.replacement.bootstrap import Measure, Resampled
from clt.replacement.scores import PerSample, answer_scores, position_scores, scored_positions, token_scores
from clt.replacement.steerable import Steerable
from clt.types import Sample


@dataclass(frozen=True, kw_only=True)
class FidelityReport:
    """The measures above, each with its interval and count."""

    n_samples: int
    n_layers_replaced: int
    positions: Literal["answer", "text"]
    """Where the teacher-forced measures were taken: before answer tokens, or all text if no sample has an answer."""
    kl: Measure
    ce_host: Measure
    ce_replacement: Measure
    ce_mean_ablated: Measure
    ce_increase: Measure
    loss_recovered: Measure | None
    """None where mean ablation changes nothing."""
    top1: Measure
    top1_filtered: Measure | None
    """None where the host is nowhere right and unsure."""
    token_match: Measure
    identical_answers: Measure
    text: Mapping[str, Measure]
    """The teacher-forced measures over all text positions."""
    at: Mapping[str, Mapping[str, Measure]]
    """KL and top-1 at every position of a kind (`text`, `image`, `special`), whatever follows it."""

    def measures(self) -> dict[str, Measure]:
        """Every measure there is, those over all text positions as `text_...`, those at a kind as `at_KIND_...`."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, Measure)}
        kinds = {f"at_{kind}_{name}": value for kind, each in self.at.items() for name, value in each.items()}
        return {**own, **{f"text_{name}": value for name, value in self.text.items()}, **kinds}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `json.dump` takes them."""
        counts = {name: getattr(self, name) for name in ("n_samples", "n_layers_replaced", "positions")}
        return {**counts, **{name: measure.to_dict() for name, measure in self.measures().items()}}


def measure_fidelity(
    replacement: Steerable,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    n_resamples: int = 1000,
    seed: int = 0,
    host_answers: Sequence[Integer[Tensor, " _position"]] | None = None,
) -> FidelityReport:
    """Compare replacement and host on samples neither was trained on.

    Args:
        host_answers: the host's greedy answers, if known from a comparison before; None: generated.
        samples: with answers, or (plain text) without.
        max_new_tokens: length of the freely generated answers.
        n_resamples: bootstrap resamples of the samples.

    Raises:
        HostModelError: there is no token to predict.
        ConfigError: an option is out of range.
    """
    require_positive("measure_fidelity", max_new_tokens=max_new_tokens, batch_size=batch_size)
    if n_resamples < 100:
        raise ConfigError(f"n_resamples = {n_resamples} is too few for a 95 % interval. Use at least 100.")
    forced = teacher_forced(replacement, samples, batch_size)
    if forced.text["n"].sum() == 0:
        raise HostModelError(
            f"None of the {len(samples)} samples has a text token to predict. Give them longer prompts, or answers."
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if host_answers is None:
        host_answers = replacement.adapter.generate_ids(samples, **options)
    scores = answer_scores(host_answers, replacement.generate_ids(samples, **options))
    free = Resampled(scores, n_resamples, seed)
    text = _measures(Resampled(forced.text, n_resamples, seed))
    has_answers = bool(forced.answer["n"].sum() > 0)
    own = _measures(Resampled(forced.answer, n_resamples, seed)) if has_answers else text
    fields: dict[str, Any] = {"loss_recovered": None, "top1_filtered": None, **own}
    return FidelityReport(
        n_samples=len(samples),
        n_layers_replaced=len(replacement.layers),
        positions="answer" if has_answers else "text",
        token_match=_defined(free.ratio(free.total("matched"), free.total("generated"), "generated")),
        identical_answers=_defined(free.ratio(free.total("identical"), free.total("samples"), "samples")),
        text=text,
        at={kind: _at_kind(Resampled(sums, n_resamples, seed)) for kind, sums in forced.kinds.items()},
        **fields,
    )


def teacher_forced(replacement: Steerable, samples: Sequence[Sample], batch_size: int) -> PerSample:
    """Run host, replacement and mean-ablated host on the same texts and add up their scores per sample."""
    means = mean_outputs(replacement.adapter, samples, batch_size)
    sums = PerSample(len(samples))
    for start in range(0, len(samples), batch_size):
        inputs = replacement.adapter.prepare(samples[start : start + batch_size])
        scored = scored_positions(inputs)
        host, ours = replacement.adapter.logits(inputs), replacement.logits(inputs)
        ablated = MeanAblated(replacement.adapter, means, replacement.layers).logits(inputs)
        where = scored.where
        sums.add(token_scores(host[where], ours[where], ablated[where], scored.following), scored, start)
        sums.add_by_kind(position_scores(host[inputs.is_token], ours[inputs.is_token]), inputs, start)
    return sums


def _at_kind(sums: Resampled) -> dict[str, Measure]:
    n = sums.total("n")
    return {name: _defined(sums.ratio(sums.total(name), n, "n")) for name in ("kl", "top1")}


def _measures(sums: Resampled) -> dict[str, Measure]:
    """The teacher-forced measures that are defined."""
    n = sums.total("n")
    names = ("kl", "ce_host", "ce_replacement", "ce_mean_ablated", "top1")
    measures = {name: sums.ratio(sums.total(name), n, "n") for name in names}
    host, ours, ablated = (sums.total(f"ce_{name}") for name in ("host", "replacement", "mean_ablated"))
    measures["ce_increase"] = sums.ratio(ours - host, n, "n")
    measures["loss_recovered"] = sums.ratio(ablated - ours, ablated - host, "n")
    measures["top1_filtered"] = sums.ratio(sums.total("top1_filtered"), sums.total("n_filtered"), "n_filtered")
    return {name: measure for name, measure in measures.items() if measure is not None}


def _defined(measure: Measure | None) -> Measure:
    """A ratio whose denominator counts something and so cannot be 0."""
    assert measure is not None
    return measure
