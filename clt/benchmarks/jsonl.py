"""Any file of questions with reference answers, or of answers that somebody has scored already."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clt.benchmarks.base import About, CountingBenchmark, SampleScore, Verdict, ratio
from clt.benchmarks.files import fingerprint, image_files, read_rows, text_of, unique
from clt.benchmarks.yes_no import first_word
from clt.config.base import require_one_of
from clt.errors import BenchmarkError, ConfigError
from clt.types import Sample

QUESTION_KEYS = ("question", "prompt", "query", "text")


@dataclass(frozen=True, kw_only=True)
class Jsonl(CountingBenchmark):
    """Rows `{"id", "question", "image", "answer", "score"}` of any set, as a JSON list or JSON lines: mean score.

    `image` may be missing. `answer` is a text or a list of texts any of which will do; how responses are compared is
    `match`. With `match = given` a row's own `score` counts, for the row's own `response` alone.
    """

    data: str | Path
    """The file."""
    match: str = "exact"
    """exact: the same words; contains: the words occur in the response; yes_no: the first word; given: `score`."""
    images: str | Path | None = None
    """Folder of the images; needed to ask, not to score."""
    good_score: float = 1.0
    """A response with at least this score is good."""
    bad_score: float = 0.0
    """A response with at most this score is bad."""

    about = About(
        name="jsonl",
        summary="Any file of questions, answers and scores",
        source="the file's author",
        license="the file's",
        higher_is_better={"score": True},
    )

    def __post_init__(self) -> None:
        require_one_of("Jsonl", "match", self.match, (*MATCHES, "given"))
        if self.bad_score >= self.good_score:
            raise ConfigError(f"Jsonl.bad_score = {self.bad_score} must be below good_score = {self.good_score}.")

    def samples(self) -> Sequence[Sample]:
        """One per row; a row without `id` has its place in the file, counted from 1."""
        return self._samples

    @cached_property
    def _samples(self) -> list[Sample]:
        rows = read_rows(Path(self.data), "questions")
        ids = unique((str(row.get("id", place)) for place, row in enumerate(rows, 1)), str(self.data))
        names = [str(row["image"]) for row in rows if row.get("image")]
        paths = image_files(Path(self.images) if self.images else None, names)
        return [self._sample(id, row, paths) for id, row in zip(ids, rows)]

    def count(self, sample: Sample, response: str) -> SampleScore:
        """The row's score, or 1 where an answer matches and 0 elsewhere."""
        if self.match == "given":
            value = self._given(sample, response)
        else:
            value = float(any(MATCHES[self.match](response, answer) for answer in sample.meta["answers"]))
        return SampleScore(id=sample.id, counts={"responses": 1, "score": value}, details={"response": response})

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The mean score."""
        return {"score": ratio(totals["score"], totals["responses"])}

    def notes(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """How responses were compared, and the file."""
        unused = dict.fromkeys(("extractor", "similarity", "judge"), "not used")
        return {"match": self.match, "undefined": [], **unused, "data": fingerprint(Path(self.data))}

    def verdict(self, score: SampleScore) -> Verdict:
        """By the two thresholds."""
        if score.counts["score"] >= self.good_score:
            return "good"
        return "bad" if score.counts["score"] <= self.bad_score else "neither"

    def _sample(self, id: str, row: Mapping[str, Any], paths: Mapping[str, tuple[Path, ...]]) -> Sample:
        where = f"{self.data}, row {id!r}"
        answer = row.get("answer")
        answers = [str(each) for each in (answer if isinstance(answer, list) else [answer]) if each is not None]
        if self.match == "given":
            if not isinstance(row.get("score"), int | float) or not isinstance(row.get("response"), str):
                raise BenchmarkError(
                    f"{where}: match = 'given' needs a number as score and the response it belongs to."
                )
        elif not answers:
            raise BenchmarkError(
                f"{where} has no answer to compare with. Use --option match=given for scored responses."
            )
        reference = {"reference": row["response"] if self.match == "given" else answers[0]}
        return Sample(
            id=id,
            prompt=text_of(row, QUESTION_KEYS, where),
            images=paths[str(row["image"])] if row.get("image") else (),
            meta={**row, **reference, "answers": answers},
        )

    def _given(self, sample: Sample, response: str) -> float:
        if response != sample.meta["response"]:
            raise BenchmarkError(
                f"{self.data}: the score of {sample.id!r} belongs to the response {sample.meta['response']!r}, not to "
                f"{response!r}. Score the new responses, or use --option match=exact with reference answers."
            )
        return float(sample.meta["score"])


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _contains(response: str, answer: str) -> bool:
    return f" {_plain(answer)} " in f" {_plain(response)} "


def _same_yes_no(response: str, answer: str) -> bool:
    return first_word(response) is not None and first_word(response) == first_word(answer)


MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda response, answer: _plain(response) == _plain(answer),
    "contains": _contains,
    "yes_no": _same_yes_no,
}
