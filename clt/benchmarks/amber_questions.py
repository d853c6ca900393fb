"""AMBER's discriminative part: yes/no questions about existence, attributes and relations.

The positive class is "No": a hallucination that was noticed. Only the exact answers `Yes` and `No` count in the
released evaluator; any other is wrong, and `n_unparsed` says how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clt.benchmarks.amber_data import EPSILON, LICENSE, SOURCE, AmberData, amber_samples, of_this_task
from clt.benchmarks.base import About, Report, SampleScore, Verdict, summed, tally
from clt.benchmarks.yes_no import first_word
from clt.config.base import require_one_of
from clt.types import Sample

KINDS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
"""Kind of question by the annotation's type."""
SECTIONS: dict[str, tuple[str, ...]] = {
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}
"""What the evaluator prints apart, and the kinds each is pooled from (each with its own 0.001)."""
TASKS: dict[str, tuple[str, ...]] = {
    "discriminative": tuple(SECTIONS),
    "existence": (),
    "attribute": ("state", "number", "action"),
    "relation": (),
}
"""The sections reported beside a task's own numbers."""
COUNTS = ("questions", "correct", "truth_no", "said_no", "right_no")
F1_GUARD = {"existence": 0.001}
"""Added to P + R; 0.0001 everywhere else."""


@dataclass(frozen=True, kw_only=True)
class AmberQuestions:
    """Yes/no questions; accuracy, precision, recall and F1 in percent, over the task and per section."""

    data: str | Path
    """AMBER's `data` folder."""
    task: str = "discriminative"
    """discriminative, or a part of it: existence, attribute, relation."""
    images: str | Path | None = None
    """Folder of the images; needed to ask, not to score."""
    parser: str = "official"
    """official: exactly `Yes` or `No`; first_word: whatever starts with one of them."""
    digits: int | None = 1
    """Decimals of the metrics, 1 as the official script prints them; None: not rounded."""

    def __post_init__(self) -> None:
        require_one_of("AmberQuestions", "task", self.task, tuple(TASKS))
        require_one_of("AmberQuestions", "parser", self.parser, ("official", "first_word"))

    @property
    def about(self) -> About:
        """What this task asks."""
        return About(
            name="amber",
            summary=f"AMBER's yes/no questions ({self.task}); the positive class is No",
            source=SOURCE,
            license=LICENSE,
            higher_is_better={"f1": True, "accuracy": True, "precision": True, "recall": True},
            max_new_tokens=16,
        )

    @cached_property
    def _files(self) -> AmberData:
        return AmberData.at(self.data)

    @cached_property
    def _kind_of(self) -> dict[str, str]:
        """Kind of question by id, of this task's questions."""
        wanted = set(KINDS.values()) if self.task == "discriminative" else set(SECTIONS[self.task])
        kinds = {id: KINDS.get(row["type"]) for id, row in self._files.annotations.items()}
        return {id: kind for id, kind in kinds.items() if kind in wanted}

    def samples(self) -> Sequence[Sample]:
        """The questions, bare as released; `meta` has the annotation's type and label."""
        return amber_samples(self._files, list(self._kind_of), self.images, lambda row: row["truth"].capitalize())

    def score(self, responses: Mapping[str, str]) -> Report:
        """Count the responses. Those to questions of AMBER's other tasks are left out and counted.

        Raises:
            BenchmarkError: an id that AMBER does not have, or no response at all.
        """
        ours, n_other = of_this_task(responses, self._kind_of, self._files)
        scores, provenance = tally("amber", self._kind_of, ours, self._count)
        totals = summed(scores)
        notes = {
            "task": self.task,
            "n_other_task": n_other,
            "parser": self.parser,
            **dict.fromkeys(("extractor", "similarity", "judge"), "not used"),
            "n_unparsed": totals["unparsed"],
            "undefined": self._undefined(totals),
            "data": self._files.fingerprints(),
        }
        return Report(metrics=self.metrics(totals), scores=scores, provenance={**provenance, **notes})

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The evaluator's numbers of the task, then of its sections with the section's name in front."""
        metrics = self._section(totals, self.task, SECTIONS.get(self.task, tuple(dict.fromkeys(KINDS.values()))))
        for section in TASKS[self.task]:
            numbers = self._section(totals, section, SECTIONS[section])
            metrics |= {f"{section}_{name}": value for name, value in numbers.items()}
        return metrics

    def verdict(self, score: SampleScore) -> Verdict:
        """Right answers are good, wrong ones bad."""
        return "good" if score.details["correct"] else "bad"

    def _count(self, id: str, response: str) -> SampleScore:
        kind, truth = self._kind_of[id], self._files.annotations[id]["truth"]
        said = response
        if self.parser == "first_word":
            said = {True: "Yes", False: "No", None: response}[first_word(response)]
        is_correct = said == truth.capitalize()
        counts = {
            f"{kind}_questions": 1,
            f"{kind}_correct": int(is_correct),
            f"{kind}_truth_no": int(truth == "no"),
            f"{kind}_said_no": int(said == "No"),
            f"{kind}_right_no": int(said == "No" and truth == "no"),
            "unparsed": int(said not in ("Yes", "No")),
        }
        details = {"kind": kind, "label": truth, "said": said, "correct": is_correct}
        return SampleScore(id=id, counts=counts, details=details)

    def _section(self, totals: Mapping[str, float], section: str, kinds: Sequence[str]) -> dict[str, float]:
        """Accuracy, precision and recall of pooled kinds, and F1 from precision and recall as they are printed."""
        pooled = {name: sum(totals.get(f"{kind}_{name}", 0) for kind in kinds) for name in COUNTS}
        guard = EPSILON if section == "discriminative" else EPSILON * len(kinds)
        shares = {
            "accuracy": pooled["correct"] / (pooled["questions"] + guard) * 100,
            "precision": pooled["right_no"] / (pooled["said_no"] + guard) * 100,
            "recall": pooled["right_no"] / (pooled["truth_no"] + guard) * 100,
        }
        shares = {name: self._rounded(share) for name, share in shares.items()}
        precision, recall = shares["precision"] / 100, shares["recall"] / 100
        f1 = 2 * precision * recall / (precision + recall + F1_GUARD.get(section, 0.0001)) * 100
        return {**shares, "f1": self._rounded(f1)}

    def _undefined(self, totals: Mapping[str, float]) -> list[str]:
        """Metrics that the evaluator prints as 0 because nothing was there to divide by."""
        undefined: list[str] = []
        sections = {"": SECTIONS.get(self.task, tuple(dict.fromkeys(KINDS.values())))}
        sections |= {f"{section}_": SECTIONS[section] for section in TASKS[self.task]}
        for prefix, kinds in sections.items():
            for metric, count in {"accuracy": "questions", "precision": "said_no", "recall": "truth_no"}.items():
                if not sum(totals.get(f"{kind}_{count}", 0) for kind in kinds):
                    undefined.append(f"{prefix}{metric}")
        return undefined

    def _rounded(self, value: float) -> float:
        return value if self.digits is None else round(value, self.digits)
