"""MME: two yes/no questions per image; existence is the part about hallucinated objects.

Files as released: one text file per task, `image TAB question TAB Yes|No`, two consecutive lines per image. A fourth
column holds responses, so the same file can be the response file. Score = 100 * accuracy + 100 * share of images with
both answers right; 200 is perfect.

Source: Fu et al. 2023, "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models",
arXiv 2306.13394.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from clt.benchmarks.base import About, Report, SampleScore, Verdict, ratio, summed, tally
from clt.benchmarks.files import fingerprint, image_files, read_text, unique
from clt.benchmarks.groups import n_incomplete, with_group_counts
from clt.errors import BenchmarkError
from clt.types import Sample

SEEN = 4
"""How many characters of an answer the official script looks at."""


class Line(NamedTuple):
    """One question of the file."""

    image: str
    question: str
    label: str
    response: str | None


@dataclass(frozen=True, kw_only=True)
class MME:
    """Two yes/no questions per image: accuracy, the share of images with both right, and MME's score of up to 200."""

    data: str | Path
    """A task's text file, or a folder that holds it."""
    task: str = "existence"
    """Which file of a folder."""
    images: str | Path | None = None
    """Folder of the images; needed to ask, not to score."""

    about = About(
        name="mme",
        summary="Two yes/no questions per image (existence, count, position, colour, ...)",
        source="Fu et al. 2023, arXiv 2306.13394",
        license="for research; see the authors' terms",
        higher_is_better={"score": True, "accuracy": True, "accuracy_plus": True},
        max_new_tokens=16,
    )

    @cached_property
    def _file(self) -> Path:
        path = Path(self.data)
        return path / f"{self.task}.txt" if path.is_dir() else path

    @cached_property
    def _lines(self) -> dict[str, Line]:
        lines = read_lines(self._file)
        odd = [first.image for first, second in zip(lines[::2], lines[1::2]) if first.image != second.image]
        if odd or len(lines) % 2:
            which = odd[0] if odd else lines[-1].image
            raise BenchmarkError(f"{self._file}: MME has two consecutive lines per image; {which} has not.")
        ids = unique((f"{line.image}/{1 + place % 2}" for place, line in enumerate(lines)), str(self._file))
        return dict(zip(ids, lines))

    @cached_property
    def _image_of(self) -> dict[str, str]:
        return {id: line.image for id, line in self._lines.items()}

    def samples(self) -> Sequence[Sample]:
        """The questions; ids are the image's name with /1 and /2."""
        paths = image_files(Path(self.images) if self.images else None, self._image_of.values())
        return [
            Sample(
                id=id,
                prompt=line.question,
                images=paths[line.image],
                meta={"label": line.label.lower(), "image": line.image, "reference": line.label},
            )
            for id, line in self._lines.items()
        ]

    def own_responses(self, path: Path) -> dict[str, str] | None:
        """The fourth column of a file like the questions'; None for other formats."""
        if path.suffix != ".txt":
            return None
        asked = {(line.image, line.question): id for id, line in self._lines.items()}
        lines = read_lines(path)
        strangers = [line for line in lines if (line.image, line.question) not in asked]
        if strangers:
            raise BenchmarkError(
                f"{path} answers {strangers[0].question!r} about {strangers[0].image}, which is not asked."
            )
        without = [line.image for line in lines if line.response is None]
        if without:
            raise BenchmarkError(f"{path}: {len(without):,} lines have no fourth column with a response.")
        ids = unique((asked[line.image, line.question] for line in lines), str(path))
        return dict(zip(ids, (line.response or "" for line in lines)))

    def score(self, responses: Mapping[str, str]) -> Report:
        """Count the responses.

        Raises:
            BenchmarkError: an unknown id, or no response at all.
        """
        scores, provenance = tally("mme", self._lines, responses, self._count)
        scores = with_group_counts(scores, self._image_of, "images")
        totals = summed(scores)
        notes = {
            "task": self._file.stem,
            "parser": f"first {SEEN} characters",
            "n_unparsed": totals["unparsed"],
            "n_incomplete_images": n_incomplete(scores, self._image_of),
            "undefined": [],
            **dict.fromkeys(("extractor", "similarity", "judge"), "not used"),
            "data": fingerprint(self._file),
        }
        return Report(metrics=self.metrics(totals), scores=scores, provenance={**provenance, **notes})

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """MME's score and the two shares it is made of."""
        accuracy = ratio(totals["right"], totals["questions"])
        both = ratio(totals["images_right"], totals["images"])
        return {"score": 100 * accuracy + 100 * both, "accuracy": accuracy, "accuracy_plus": both}

    def verdict(self, score: SampleScore) -> Verdict:
        """Right answers are good, wrong ones bad."""
        return "good" if score.counts["right"] else "bad"

    def _count(self, id: str, response: str) -> SampleScore:
        label, said = self._lines[id].label.lower(), read_answer(response)
        counts = {"questions": 1, "right": int(said == label), "unparsed": int(said is None)}
        return SampleScore(id=id, counts=counts, details={"label": label, "said": said, "correct": said == label})


def read_answer(response: str) -> str | None:
    """yes or no: the whole answer, else `yes`, else `no` among its first four characters; None for neither."""
    text = response.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:SEEN]), None)


def read_lines(path: Path) -> list[Line]:
    """The lines of a task file.

    Raises:
        BenchmarkError: the file is missing or empty, or a line has not three or four columns or no yes/no label.
    """
    lines = [line for line in read_text(path, "MME questions").split("\n") if line.strip()]
    if not lines:
        raise BenchmarkError(f"{path} (MME questions) is empty.")
    return [_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _line(line: str, where: str) -> Line:
    columns = line.rstrip("\r").split("\t")
    if len(columns) not in (3, 4) or columns[2].strip().lower() not in ("yes", "no"):
        raise BenchmarkError(
            f"{where}: MME's lines are image, question, Yes or No (and a response), with tabs between."
        )
    return Line(columns[0], columns[1], columns[2].strip(), columns[3] if len(columns) == 4 else None)
