"""LLaVA-Bench: a judge compares the model's answer with a reference answer, given a description of the image.

Files as released, JSON lines keyed by `question_id`: questions (`image`, `text`, `category`), the context (`caption`,
keyed by image or question) and the reference answers (`text`). The number is 100 * sum of the model's marks / sum of
the reference's.

Source: Liu et al. 2023, "Visual Instruction Tuning", arXiv 2304.08485.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clt.benchmarks.base import About, Report, SampleScore, Verdict, answered_ids, few, ratio, summed, tally
from clt.benchmarks.files import fingerprint, image_files, read_rows, text_of, unique
from clt.benchmarks.judged import JudgeOptions, filled
from clt.errors import BenchmarkError
from clt.types import Sample

FIELDS = ("context", "question", "reference", "answer")
PROMPT = """Two assistants answered a question about an image. You do not see it; this describes it:
{context}

Question: {question}

Assistant 1: {reference}

Assistant 2: {answer}

Mark each answer from 1 to 10 for helpfulness, relevance, accuracy and detail. The first line of your reply holds only
the two marks, of assistant 1 and then of assistant 2, separated by a space. Explain yourself on the lines below; do not
let the order decide.
"""


@dataclass(frozen=True, kw_only=True)
class LlavaBench(JudgeOptions):
    """Open questions, answers marked beside a reference answer by a judge: relative score in percent, per category.

    The wording of the judge's prompt is ours; bring the authors' as `template` to compare with published numbers.
    Replies whose first line is not two numbers are left out and counted in `n_parse_failures`, calls that failed in
    `n_judge_failures`.
    """

    data: str | Path
    """The questions."""
    reference: str | Path
    """The reference answers (GPT-4's, in the release)."""
    context: str | Path | None = None
    """The descriptions of the images for the judge; None: it gets none."""
    images: str | Path | None = None
    """Folder of the images; needed to ask, not to score."""
    good_ratio: float = 1.0
    """A good answer has at least this share of the reference's mark."""
    bad_ratio: float = 0.5
    """A bad answer has at most this share."""

    about = About(
        name="llava-bench",
        summary="Conversation, detail and reasoning questions, marked by a judge beside a reference answer",
        source="Liu et al. 2023, arXiv 2304.08485; github.com/haotian-liu/LLaVA",
        license="Apache-2.0 (code); images: COCO's and their owners' terms",
        higher_is_better={"relative_score": True},
        max_new_tokens=1024,
    )

    @cached_property
    def _questions(self) -> dict[str, dict[str, Any]]:
        return _by_id(Path(self.data), "LLaVA-Bench questions")

    @cached_property
    def _references(self) -> dict[str, dict[str, Any]]:
        rows = _by_id(Path(self.reference), "LLaVA-Bench reference answers")
        missing = [id for id in self._questions if id not in rows]
        if missing:
            raise BenchmarkError(f"{self.reference} has no answer to {len(missing):,} questions: {few(missing)}.")
        return rows

    @cached_property
    def _contexts(self) -> dict[str, str]:
        """Description by image, or by question id where the rows have one."""
        rows = read_rows(Path(self.context), "LLaVA-Bench context") if self.context else []
        where = str(self.context)
        return {
            text_of(row, ("question_id", "id", "image"), where): text_of(row, ("caption", "context", "text"), where)
            for row in rows
        }

    def samples(self) -> Sequence[Sample]:
        """The questions; `meta` has category, image and the reference answer."""
        paths = image_files(Path(self.images) if self.images else None, map(_image, self._questions.values()))
        return [
            Sample(
                id=id,
                prompt=text_of(row, ("text", "question"), f"{self.data}, question {id}"),
                images=paths[_image(row)],
                meta={**row, "reference": self._references[id]["text"]},
            )
            for id, row in self._questions.items()
        ]

    def score(self, responses: Mapping[str, str]) -> Report:
        """Have the responses marked.

        Raises:
            BenchmarkError: an unknown id, no response at all, no judge, or no reply that can be read.
        """
        answered = answered_ids("llava-bench", self._questions, responses)
        judged = self.asked([self._prompt(id, responses[id]) for id in answered])
        replies = dict(zip(answered, judged.replies))
        scores, provenance = tally(
            "llava-bench", self._questions, responses, lambda id, _: self._count(id, replies[id])
        )
        totals = summed(scores)
        judged.require_read(len(scores) - judged.provenance["n_judge_failures"] - int(totals["unparsed"]))
        notes = {
            "template": str(self.template or "built in"),
            "n_parse_failures": totals["unparsed"],
            "undefined": [] if totals["reference_mark"] else ["relative_score"],
            "extractor": "not used",
            "similarity": "not used",
            "data": [fingerprint(Path(path)) for path in (self.data, self.reference, self.context) if path],
        }
        return Report(
            metrics=self.metrics(totals), scores=scores, provenance={**provenance, **judged.provenance, **notes}
        )

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The relative score over all questions and per category."""
        suffix = "_reference_mark"
        categories = sorted(name.removesuffix(suffix) for name in totals if name.endswith(suffix))
        return {
            "relative_score": 100 * ratio(totals["model_mark"], totals["reference_mark"]),
            **{
                f"{each}_relative_score": 100 * ratio(totals[f"{each}_model_mark"], totals[f"{each}_reference_mark"])
                for each in categories
            },
        }

    def verdict(self, score: SampleScore) -> Verdict:
        """By the share of the reference's mark; neither where there are no marks."""
        if not score.counts["reference_mark"]:
            return "neither"
        share = score.counts["model_mark"] / score.counts["reference_mark"]
        if share >= self.good_ratio:
            return "good"
        return "bad" if share <= self.bad_ratio else "neither"

    def _prompt(self, id: str, response: str) -> str:
        row = self._questions[id]
        context = self._contexts.get(id, self._contexts.get(_image(row), ""))
        if self.context and not context:
            raise BenchmarkError(f"{self.context} has no context for question {id!r} (image {_image(row)!r}).")
        values = {
            "context": context,
            "question": text_of(row, ("text", "question"), f"{self.data}, question {id}"),
            "reference": text_of(self._references[id], ("text", "answer"), f"{self.reference}, question {id}"),
            "answer": response,
        }
        return filled(self.wording(PROMPT, FIELDS), values)

    def _count(self, id: str, reply: str | None) -> SampleScore:
        category = str(self._questions[id].get("category", "other"))
        marks = None if reply is None else marks_in(reply)
        reference, model = marks or (0.0, 0.0)
        counts = {
            "unparsed": int(reply is not None and marks is None),
            "reference_mark": reference,
            "model_mark": model,
            f"{category}_reference_mark": reference,
            f"{category}_model_mark": model,
        }
        return SampleScore(id=id, counts=counts, details={"category": category, "reply": reply})


def marks_in(reply: str) -> tuple[float, float] | None:
    """The two marks of the reply's first line; None if it is not two numbers between 0 and 10."""
    words = reply.strip().split("\n")[0].replace(",", " ").split()
    try:
        marks = [float(word) for word in words]
    except ValueError:
        return None
    return (marks[0], marks[1]) if len(marks) == 2 and all(0 <= mark <= 10 for mark in marks) else None


def _by_id(path: Path, what: str) -> dict[str, dict[str, Any]]:
    rows = read_rows(path, what)
    ids = [text_of(row, ("question_id", "id"), f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    return dict(zip(unique(ids, str(path)), rows))


def _image(row: Mapping[str, Any]) -> str:
    return str(row.get("image", ""))
