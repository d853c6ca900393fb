"""What a benchmark is: questions about images, and how the answers are counted.

Every score is a sum of counts per sample. `metrics(totals)` turns the sums into the official numbers, so an interval
(resample the samples, add up again) or a part of the set needs no second implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from clt.errors import BenchmarkError
from clt.types import Sample

Verdict = Literal["good", "bad", "neither"]


@dataclass(frozen=True, kw_only=True)
class About:
    """What `clt bench info` says."""

    name: str
    summary: str
    """One line for lists."""
    source: str
    """The paper or project that defines the set and its numbers."""
    license: str
    """Of the data, as far as its authors state one; users bring their own copy."""
    higher_is_better: Mapping[str, bool]
    """The main metrics, the most important first, and which way is up."""
    max_new_tokens: int = 512
    """How long an answer may become."""


@dataclass(frozen=True, kw_only=True)
class SampleScore:
    """One scored response."""

    id: str
    counts: Mapping[str, float]
    """Sufficient statistics: summed over samples they give the official numbers."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What explains the counts (words found, answer as parsed, ...); plain values."""

    def to_dict(self) -> dict[str, Any]:
        """One flat JSON object, as the phases write it; a detail never hides a count."""
        return {"id": self.id, **self.details, **self.counts}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The numbers, what they are made of, and how they came about."""

    metrics: Mapping[str, float]
    scores: tuple[SampleScore, ...]
    provenance: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What `clt bench score --json` prints."""
        return {"metrics": dict(self.metrics), "provenance": dict(self.provenance)}


@runtime_checkable
class Benchmark(Protocol):
    """The least every benchmark has. `CountingBenchmark` implements `score` for sets scored sample by sample."""

    @property
    def about(self) -> About:
        """Name, source and which way is up."""
        ...

    def samples(self) -> Iterable[Sample]:
        """What to ask, without answers.

        `prompt` is the bare question unless it already holds an image placeholder; `meta["reference"]` is the best
        answer, where there is one.
        """
        ...

    def score(self, responses: Mapping[str, str]) -> Report:
        """Count the responses, given by sample id. Missing ones are counted in the provenance, unknown ids refused."""
        ...

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The official numbers from summed counts."""
        ...

    def verdict(self, score: SampleScore) -> Verdict:
        """Whether a response is a clear example of a good or of a bad one."""
        ...


@runtime_checkable
class ReadsResponses(Protocol):
    """A benchmark whose authors' response files need more than an id and a text in each row."""

    def own_responses(self, path: Path) -> dict[str, str] | None:
        """Response by sample id; None if the file is not of the authors' form."""
        ...


class CountingBenchmark(ABC):
    """Implements `score` for a benchmark that can count each sample by itself.

    A subclass has `about`, `samples`, `count`, `metrics` and `verdict`; see `docs/benchmark-sets.md` for one in full.
    """

    about: About

    @abstractmethod
    def samples(self) -> Iterable[Sample]:
        """What to ask."""

    @abstractmethod
    def count(self, sample: Sample, response: str) -> SampleScore:
        """The counts of one response."""

    @abstractmethod
    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The official numbers from summed counts."""

    def notes(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """What the report should say besides: plug-ins used, parse failures, metrics without a denominator."""
        return {}

    def score(self, responses: Mapping[str, str]) -> Report:
        """Count every response that was given.

        Raises:
            BenchmarkError: an id that is none of the samples', or no response at all.
        """
        samples = {sample.id: sample for sample in self.samples()}
        scores, provenance = tally(
            self.about.name, samples, responses, lambda id, response: self.count(samples[id], response)
        )
        totals = summed(scores)
        return Report(metrics=self.metrics(totals), scores=scores, provenance={**provenance, **self.notes(totals)})


def tally(
    name: str,
    ids: Collection[str],
    responses: Mapping[str, str],
    count: Callable[[str, str], SampleScore],
) -> tuple[tuple[SampleScore, ...], dict[str, Any]]:
    """Count each response in the order of the samples; the provenance says how many are missing or empty.

    Raises:
        BenchmarkError: an id that is none of the samples', or no response at all.
    """
    answered = answered_ids(name, ids, responses)
    provenance = {
        "benchmark": name,
        "n_samples": len(ids),
        "n_scored": len(answered),
        "n_missing": len(ids) - len(answered),
        "n_empty": sum(not responses[id].strip() for id in answered),
    }
    return tuple(count(id, responses[id]) for id in answered), provenance


def answered_ids(name: str, ids: Collection[str], responses: Mapping[str, str]) -> list[str]:
    """The samples that have a response, in order.

    Raises:
        BenchmarkError: an id that is none of the samples', or no response at all.
    """
    known = set(ids)
    unknown = [id for id in responses if id not in known]
    if unknown:
        raise BenchmarkError(
            f"{name}: {len(unknown):,} of {len(responses):,} responses have ids that are not in the benchmark: "
            f"{few(unknown)}.\nThe benchmark has {len(known):,} samples: {few(list(ids))}. The responses probably "
            "belong to another set, split or task."
        )
    if not responses:
        raise BenchmarkError(f"{name}: there are no responses to score. The benchmark has {len(known):,} samples.")
    return [id for id in ids if id in responses]


def summed(scores: Iterable[SampleScore]) -> dict[str, float]:
    """The counts of all samples added up."""
    totals: dict[str, float] = {}
    for score in scores:
        for name, value in score.counts.items():
            totals[name] = totals.get(name, 0) + value
    return totals


def ratio(part: float, whole: float) -> float:
    """part / whole; 0 where there is nothing to divide by (reports list such metrics as undefined)."""
    return part / whole if whole else 0.0


def few(names: Sequence[str], n: int = 3) -> str:
    """The first names, for messages."""
    return ", ".join(map(repr, names[:n])) + (", ..." if len(names) > n else "")
