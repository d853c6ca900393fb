"""HallusionBench: yes/no questions in groups, about figures and the same questions about edited figures or none.

aAcc: share of right answers; fAcc: share of figures all of whose questions are right; qAcc: share of questions that are
right about all of their figures. Answers are read by rule (yes or no as first word) or rated by a judge as correct,
incorrect or unclear; unclear is right only where there is no figure (VS, figure 0).

Source: Guan et al. 2023, "HallusionBench", arXiv 2310.14566; github.com/tianyi-lab/HallusionBench.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clt.benchmarks.base import About, Report, SampleScore, Verdict, answered_ids, ratio, summed, tally
from clt.benchmarks.files import fingerprint, image_files, read_rows, text_of, unique
from clt.benchmarks.groups import n_incomplete, with_group_counts
from clt.benchmarks.judged import JudgeOptions, filled
from clt.benchmarks.yes_no import first_word
from clt.errors import BenchmarkError
from clt.types import Sample

KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")
FIELDS = ("question", "reference", "answer")
PROMPT = """A yes/no question, its correct answer, and an answer to check:

Question: {question}
Correct answer: {reference}
Answer to check: {answer}

Does the answer to check agree with the correct answer? Reply with one word: correct, incorrect, or unclear (if it takes
no side or says that it cannot know).
"""
RULINGS = ("incorrect", "correct", "unclear")


@dataclass(frozen=True, kw_only=True)
class HallusionBench(JudgeOptions):
    """Yes/no questions about figures, edited figures and no figure: accuracy per answer, per figure, per question.

    judge = rule (default) reads the first word; the official numbers come from GPT-4 as judge.
    """

    data: str | Path
    """The released HallusionBench.json."""
    images: str | Path | None = None
    """Folder that holds the images by their `filename`; needed to ask, not to score."""
    judge: str = "rule"
    """rule: yes or no as first word; otherwise a judge rates each answer."""

    about = About(
        name="hallusionbench",
        summary="Yes/no questions about figures and edited figures, right per question, figure and group",
        source="Guan et al. 2023, arXiv 2310.14566",
        license="BSD-3-Clause (stated by its authors)",
        higher_is_better={"accuracy": True, "figure_accuracy": True, "question_accuracy": True},
        max_new_tokens=128,
    )

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        rows = read_rows(Path(self.data), "HallusionBench questions")
        wrong = [place for place, row in enumerate(rows, 1) if str(row.get("gt_answer")) not in ("0", "1")]
        if wrong:
            raise BenchmarkError(f"{self.data}, row {wrong[0]}: gt_answer must be 0 (no) or 1 (yes).")
        ids = unique((_id_of(row, f"{self.data}, row {place}") for place, row in enumerate(rows, 1)), str(self.data))
        return dict(zip(ids, rows))

    @cached_property
    def _figures(self) -> dict[str, Hashable]:
        """Figure by sample id; questions without a figure belong to none."""
        return {id: _key(row, KEY[:4]) for id, row in self._rows.items() if not _without_figure(row)}

    @cached_property
    def _questions(self) -> dict[str, Hashable]:
        """Question, whatever the figure, by sample id."""
        return {id: _key(row, (*KEY[:3], "question_id")) for id, row in self._rows.items()}

    def samples(self) -> Sequence[Sample]:
        """The questions; those of the category VS with figure 0 have no image."""
        names = {id: str(row["filename"]) for id, row in self._rows.items() if row.get("filename")}
        paths = image_files(Path(self.images) if self.images else None, names.values())
        return [
            Sample(
                id=id,
                prompt=text_of(row, ("question",), f"{self.data}, {id}"),
                images=paths[names[id]] if id in names else (),
                meta={**row, "label": _label(row), "reference": _label(row).capitalize()},
            )
            for id, row in self._rows.items()
        ]

    def own_responses(self, path: Path) -> dict[str, str] | None:
        """The released rows with a `model_prediction`; None for other formats."""
        rows = read_rows(path, "responses")
        if not all("model_prediction" in row and all(key in row for key in KEY) for row in rows):
            return None
        ids = unique((_id_of(row, str(path)) for row in rows), str(path))
        return {id: text_of(row, ("model_prediction",), f"{path}, {id}") for id, row in zip(ids, rows)}

    def score(self, responses: Mapping[str, str]) -> Report:
        """Count the responses, by rule or as a judge rates them.

        Raises:
            BenchmarkError: an unknown id, no response at all, or a judge that cannot be asked.
        """
        answered = answered_ids("hallusionbench", self._rows, responses)
        rulings, notes = self._rulings(answered, responses)
        scores, provenance = tally("hallusionbench", self._rows, responses, lambda id, _: self._count(id, rulings[id]))
        scores = with_group_counts(scores, self._figures, "figures")
        scores = with_group_counts(scores, self._questions, "groups")
        totals = summed(scores)
        notes |= {
            "n_incomplete_figures": n_incomplete(scores, self._figures),
            "n_incomplete_questions": n_incomplete(scores, self._questions),
            "undefined": [] if totals["figures"] else ["figure_accuracy"],
            "extractor": "not used",
            "similarity": "not used",
            "data": fingerprint(Path(self.data)),
        }
        return Report(metrics=self.metrics(totals), scores=scores, provenance={**provenance, **notes})

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """aAcc, fAcc and qAcc, as fractions."""
        return {
            "accuracy": ratio(totals["right"], totals["questions"]),
            "figure_accuracy": ratio(totals["figures_right"], totals["figures"]),
            "question_accuracy": ratio(totals["groups_right"], totals["groups"]),
        }

    def verdict(self, score: SampleScore) -> Verdict:
        """Right answers are good, wrong ones bad; unclear ones are neither unless unclear is right."""
        if score.counts["right"]:
            return "good"
        return "bad" if score.details["ruling"] == "incorrect" else "neither"

    def _rulings(
        self, answered: Sequence[str], responses: Mapping[str, str]
    ) -> tuple[dict[str, str | None], dict[str, Any]]:
        """correct, incorrect or unclear for each response (None: no ruling), and what the report says about it."""
        if self.judge == "rule":
            by_rule: dict[str, str | None] = {id: self._by_rule(id, responses[id]) for id in answered}
            n_unclear = sum(ruling == "unclear" for ruling in by_rule.values())
            return by_rule, {"judge": "rule", "n_unparsed": n_unclear}
        wording = self.wording(PROMPT, FIELDS)
        judged = self.asked([filled(wording, self._values(id, responses[id])) for id in answered])
        rulings = {id: None if reply is None else ruling_in(reply) for id, reply in zip(answered, judged.replies)}
        n_read = sum(ruling is not None for ruling in rulings.values())
        judged.require_read(n_read)
        n_unread = len(answered) - judged.provenance["n_judge_failures"] - n_read
        return rulings, {
            **judged.provenance,
            "template": str(self.template or "built in"),
            "n_parse_failures": n_unread,
        }

    def _by_rule(self, id: str, response: str) -> str:
        said = first_word(response)
        if said is None:
            return "unclear"
        return "correct" if said == (_label(self._rows[id]) == "yes") else "incorrect"

    def _values(self, id: str, response: str) -> dict[str, str]:
        row = self._rows[id]
        reference = str(row.get("gt_answer_details") or _label(row))
        return {"question": str(row["question"]), "reference": reference, "answer": response}

    def _count(self, id: str, ruling: str | None) -> SampleScore:
        is_right = ruling == "correct" or (ruling == "unclear" and _without_figure(self._rows[id]))
        counts = {"questions": 1, "right": int(is_right)}
        return SampleScore(id=id, counts=counts, details={"label": _label(self._rows[id]), "ruling": ruling})


def ruling_in(reply: str) -> str | None:
    """The one ruling the reply names (or its official number 0, 1, 2); None for none or several."""
    words = set(re.findall(r"[a-z]+|\d+", reply.lower()))
    found = [name for number, name in enumerate(RULINGS) if name in words or str(number) in words]
    return found[0] if len(found) == 1 else None


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in names)


def _id_of(row: Mapping[str, Any], where: str) -> str:
    return "_".join(text_of(row, (name,), where) for name in KEY)


def _label(row: Mapping[str, Any]) -> str:
    return "yes" if str(row["gt_answer"]) == "1" else "no"


def _without_figure(row: Mapping[str, Any]) -> bool:
    return str(row["category"]) == "VS" and str(row["figure_id"]) == "0"
