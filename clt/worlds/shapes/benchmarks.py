"""The shapes world as benchmarks: POPE-like questions, AMBER-like descriptions, or both, of scenes nobody trained on.

They need no files: scenes are drawn from their numbers. Registered through entry points, like anybody's benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from clt.benchmarks import About, CountingBenchmark, SampleScore, Verdict
from clt.benchmarks.base import ratio
from clt.benchmarks.yes_no import cell_or_unread, confusion_metrics, undefined_metrics
from clt.config.base import require_one_of, require_positive
from clt.errors import ConfigError
from clt.types import Sample
from clt.worlds.base import SPLITS
from clt.worlds.shapes import score, text
from clt.worlds.shapes.world import QUESTIONS_PER_SCENE, ShapesWorld

SOURCE = "this package, docs/worlds.md"


@dataclass(frozen=True, kw_only=True)
class _Scenes(CountingBenchmark):
    """Which scenes."""

    n: int
    """How many samples."""
    seed: int = 0
    """Another seed draws other scenes."""
    split: str = "held_out"
    """train: the scenes that hosts and transcoders are trained on; held_out: all others."""

    def __post_init__(self) -> None:
        require_positive(type(self).__name__, n=self.n)
        require_one_of(type(self).__name__, "split", self.split, SPLITS)

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        unused = dict.fromkeys(("similarity", "judge"), "not used")
        return {"scenes": {"split": self.split, "seed": self.seed}, **unused}


@dataclass(frozen=True, kw_only=True)
class ShapesPope(_Scenes):
    """Yes/no questions about drawn shapes, with random, popular and adversarial negatives: accuracy, F1, yes ratio.

    All in percent, with yes as the positive class. A question's answer is its first word; any but yes and no is wrong.
    """

    n: int = 600

    about = About(
        name="shapes-pope",
        summary="POPE-like questions of the embedded world",
        source=SOURCE,
        license="MIT",
        higher_is_better={"accuracy": True, "adversarial_accuracy": True, "f1": True},
        max_new_tokens=8,
    )

    def samples(self) -> Sequence[Sample]:
        """Six questions per scene; `meta` has category, label and object."""
        return self._samples

    @cached_property
    def _samples(self) -> list[Sample]:
        world = ShapesWorld()
        questions = world.questions(self.split, self.n, self.seed)  # pyright: ignore[reportArgumentType]
        return [_with_reference(sample, sample.meta["label"].capitalize()) for sample in questions]

    def count(self, sample: Sample, response: str) -> SampleScore:
        """The place in the confusion table of the question's category."""
        (count,) = score.count_questions([sample], [response])
        cells = cell_or_unread(count.said_yes, count.is_yes)
        counts = {f"{count.category}_{name}": value for name, value in cells.items()}
        details = {"category": count.category, "label": sample.meta["label"], "correct": count.is_correct}
        return SampleScore(id=sample.id, counts={**counts, "unparsed": int(count.said_yes is None)}, details=details)

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Over all questions, and again per category with its name in front."""
        metrics = confusion_metrics(_pooled(totals))
        for category in text.CATEGORIES:
            metrics |= confusion_metrics(totals, f"{category}_")
        return {name: 100 * value for name, value in metrics.items()}

    def notes(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """Which scenes, unread answers, metrics without denominator."""
        notes = {"n_unparsed": totals["unparsed"], "undefined": undefined_metrics(_pooled(totals))}
        return {"parser": "first_word", "extractor": "not used", **self._provenance, **notes}

    def verdict(self, score: SampleScore) -> Verdict:
        """Right answers are good, wrong ones bad."""
        return "good" if score.details["correct"] else "bad"


@dataclass(frozen=True, kw_only=True)
class ShapesAmber(_Scenes):
    """Descriptions of drawn shapes: objects invented (chair, hal, cog) and objects found (cover), in percent."""

    n: int = 300

    about = About(
        name="shapes-amber",
        summary="AMBER-like descriptions of the embedded world",
        source=SOURCE,
        license="MIT",
        higher_is_better={"hal": False, "chair": False, "cover": True, "cog": False},
        max_new_tokens=40,
    )

    def samples(self) -> Sequence[Sample]:
        """One request per scene; `meta` has truth and hallucination_targets."""
        return self._samples

    @cached_property
    def _samples(self) -> list[Sample]:
        world = ShapesWorld()
        requests = world.descriptions(self.split, self.n, self.seed)  # pyright: ignore[reportArgumentType]
        return [_with_reference(sample, f"There is {', '.join(sample.meta['truth'])}.") for sample in requests]

    def count(self, sample: Sample, response: str) -> SampleScore:
        """What was mentioned, invented, expected and found."""
        (count,) = score.count_descriptions([sample], [response])
        counts = count._asdict()
        del counts["id"]
        counts |= {"responses": 1, "with_invention": int(count.hallucinated > 0)}
        mentioned = score.mentioned(response)
        invented = [kind for kind in mentioned if kind not in sample.meta["truth"]]
        details = {"mentioned": mentioned, "invented": invented, "coverage": ratio(count.covered, count.truth)}
        return SampleScore(id=sample.id, counts=counts, details=details)

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """AMBER's four numbers, pooled over responses."""
        return {
            "chair": score.percent(totals["hallucinated"], totals["mentions"]),
            "cover": score.percent(totals["covered"], totals["truth"]),
            "hal": score.percent(totals["with_invention"], totals["responses"]),
            "cog": score.percent(totals["targeted"], totals["mentions"]),
        }

    def notes(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """Which scenes, and whether nothing at all was mentioned."""
        return {
            "extractor": "whole words",
            **self._provenance,
            "undefined": [] if totals["mentions"] else ["chair", "cog"],
        }

    def verdict(self, score: SampleScore) -> Verdict:
        """Good: everything found and nothing invented; bad: something invented."""
        if score.counts["hallucinated"]:
            return "bad"
        return "good" if score.counts["covered"] == score.counts["truth"] else "neither"


@dataclass(frozen=True, kw_only=True)
class Shapes(_Scenes):
    """Both of the above on the same drawn scenes: a description of each, and six questions about it."""

    n: int = 600
    """How many scenes."""
    asked: int | None = None
    """Ask questions about the first so many of them only; None: about all."""

    about = About(
        name="shapes",
        summary="Descriptions of drawn scenes and POPE-like questions about them",
        source=SOURCE,
        license="MIT",
        higher_is_better={"hal": False, "chair": False, "cover": True, "adversarial_accuracy": True, "accuracy": True},
        max_new_tokens=40,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("Shapes", asked=self.asked)
        if self.asked is not None and self.asked > self.n:
            raise ConfigError(f"Shapes.asked = {self.asked} is more than n = {self.n}, the number of scenes.")

    @cached_property
    def _parts(self) -> tuple[ShapesAmber, ShapesPope]:
        where = {"seed": self.seed, "split": self.split}
        n_questions = QUESTIONS_PER_SCENE * (self.asked or self.n)
        return ShapesAmber(n=self.n, **where), ShapesPope(n=n_questions, **where)

    def samples(self) -> Sequence[Sample]:
        """Scene by scene: the request for a description, then the questions if there are any."""
        described, asked = (part.samples() for part in self._parts)
        size = QUESTIONS_PER_SCENE
        return [each for n, one in enumerate(described) for each in (one, *asked[size * n : size * (n + 1)])]

    def count(self, sample: Sample, response: str) -> SampleScore:
        """As the part that the sample comes from counts."""
        return self._parts["label" in sample.meta].count(sample, response)

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Both parts' numbers."""
        known = {name: totals.get(name, 0) for name in (*_AMBER_COUNTS, *totals)}
        return {name: value for part in self._parts for name, value in part.metrics(known).items()}

    def notes(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """Which scenes, unread answers, metrics without denominator."""
        known = {name: totals.get(name, 0) for name in (*_AMBER_COUNTS, "unparsed", *totals)}
        amber, pope = (part.notes(known) for part in self._parts)
        return {**pope, **amber, "undefined": [*amber["undefined"], *pope["undefined"]]}

    def verdict(self, score: SampleScore) -> Verdict:
        """As the part that the sample comes from judges."""
        return self._parts["label" in score.details].verdict(score)


_AMBER_COUNTS = ("mentions", "hallucinated", "truth", "covered", "targeted", "responses", "with_invention")


def _with_reference(sample: Sample, reference: str) -> Sample:
    return replace(sample, meta={**sample.meta, "reference": reference})


def _pooled(totals: Mapping[str, float]) -> dict[str, float]:
    """The cells of all categories together."""
    names = ("tp", "fp", "tn", "fn", "unread")
    return {name: sum(totals.get(f"{category}_{name}", 0) for category in text.CATEGORIES) for name in names}
