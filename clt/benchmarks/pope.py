"""POPE: is there such an object in the image? Yes or no; half of the questions ask for what is not there.

Question files as released: JSON lines (`coco_pope_random.json`, ...) or, in the SEEM variants, one JSON list. With a
folder as data the split's file is looked up in it, and `split="all"` takes the three of them.

Source: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv 2305.10355).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clt.benchmarks.base import About, CountingBenchmark, SampleScore, Verdict, ratio
from clt.benchmarks.files import fingerprint, image_files, read_rows, text_of, unique
from clt.benchmarks.yes_no import CELLS, cell, confusion_metrics, pope_rule, says_neither, undefined_metrics
from clt.config.base import require_one_of
from clt.errors import BenchmarkError
from clt.types import Sample

SPLITS = ("random", "popular", "adversarial")
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@dataclass(frozen=True, kw_only=True)
class Pope(CountingBenchmark):
    """Yes/no questions about objects that are or are not in the image: accuracy, precision, recall, F1, yes ratio.

    All are fractions, not rounded, with yes as the positive class.

    Raises:
        BenchmarkError: (when its files are read) missing or damaged files, labels that are neither yes nor no,
            ids that occur twice, images that are missing.
    """

    data: str | Path
    """Question file, or the folder that holds the splits' files."""
    split: str | None = None
    """Which file of a folder; all: the three together, each reported, the headline being their mean."""
    images: str | Path | None = None
    """Folder of the images; needed to ask, not to score."""

    about = About(
        name="pope",
        summary="Yes/no questions about objects that are or are not in the image (random, popular, adversarial)",
        source="Li et al. 2023, arXiv 2305.10355; github.com/RUCAIBox/POPE",
        license="MIT (questions); images: COCO's terms",
        higher_is_better={"accuracy": True, "f1": True, "precision": True, "recall": True},
        max_new_tokens=16,
    )

    def __post_init__(self) -> None:
        require_one_of("Pope", "split", self.split, (*SPLITS, "all", None))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Question file by split; one unnamed split when a file was given."""
        folder = Path(self.data)
        if not folder.is_dir():
            if self.split is not None:
                raise BenchmarkError(
                    f"split = {self.split!r} needs a folder of question files as data; {folder} is "
                    f"{'one file' if folder.exists() else 'missing'}. Leave the split out, or give the folder."
                )
            return {"": folder}
        if self.split is None:
            raise BenchmarkError(f"{folder} is a folder: choose --split {', '.join(SPLITS)} or all, or give one file.")
        return {split: _file_of(folder, split) for split in (SPLITS if self.split == "all" else (self.split,))}

    def samples(self) -> Sequence[Sample]:
        """The questions; `meta` has label, image and split. With `split="all"` ids are `random/1` and so on."""
        return self._samples

    @cached_property
    def _samples(self) -> list[Sample]:
        asked = {split: read_questions(path) for split, path in self.files.items()}
        names = (question["image"] for questions in asked.values() for question in questions)
        images = image_files(Path(self.images) if self.images else None, names)
        return [
            Sample(
                id=f"{split}/{question['id']}" if len(asked) > 1 else question["id"],
                prompt=question["text"],
                images=images[question["image"]],
                meta={
                    "label": question["label"],
                    "reference": question["label"].capitalize(),
                    "image": question["image"],
                    "split": split,
                },
            )
            for split, questions in asked.items()
            for question in questions
        ]

    def count(self, sample: Sample, response: str) -> SampleScore:
        """The place in the confusion table (positive = yes), named after the split when there are several."""
        is_yes = sample.meta["label"] == "yes"
        said = pope_rule(response)
        prefix = f"{sample.meta['split']}_" if len(self.files) > 1 else ""
        counts = {f"{prefix}{name}": value for name, value in cell(said, is_yes).items()}
        details = {"label": sample.meta["label"], "said": "yes" if said else "no", "correct": said == is_yes}
        return SampleScore(id=sample.id, counts={**counts, "unparsed": int(says_neither(response))}, details=details)

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The evaluator's numbers; for three splits each one's, and their means in front."""
        if len(self.files) == 1:
            return confusion_metrics(totals)
        per_split: dict[str, float] = {}
        for split in self.files:
            per_split |= confusion_metrics(totals, f"{split}_")
        asked = [split for split in self.files if any(totals.get(f"{split}_{name}") for name in CELLS)]
        means = {name: ratio(sum(per_split[f"{split}_{name}"] for split in asked), len(asked)) for name in METRICS}
        return {**means, **per_split}

    def notes(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """Parser, unread answers, metrics without denominator, the question files."""
        prefixes = [f"{split}_" for split in self.files] if len(self.files) > 1 else [""]
        return {
            "parser": "pope_rule",
            "n_unparsed": totals["unparsed"],
            "undefined": [name for prefix in prefixes for name in undefined_metrics(totals, prefix)],
            "data": [fingerprint(path) for path in self.files.values()],
        }

    def verdict(self, score: SampleScore) -> Verdict:
        """Right answers are good, wrong ones bad."""
        return "good" if score.details["correct"] else "bad"


def read_questions(path: Path) -> list[dict[str, str]]:
    """Id, text, image and label of each question, from any of the released formats (POPE, SEEM, POPEv2).

    Raises:
        BenchmarkError: the file is damaged, a label is neither yes nor no, or an id occurs twice.
    """
    rows = read_rows(path, "POPE questions")
    questions = [_question(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    unique((question["id"] for question in questions), str(path))
    return questions


def _question(row: Mapping[str, Any], where: str) -> dict[str, str]:
    label = text_of(row, ("label",), where).strip().lower()
    if label not in ("yes", "no"):
        raise BenchmarkError(f"{where}: the label is {row['label']!r}; POPE's labels are yes and no.")
    return {
        "id": text_of(row, ("question_id", "image_id", "id"), where),
        "text": text_of(row, ("text", "query", "question"), where),
        "image": text_of(row, ("image", "image_name"), where),
        "label": label,
    }


def _file_of(folder: Path, split: str) -> Path:
    """The one question file of a split in the folder, whatever the image set is called."""
    found = sorted(path for path in folder.glob(f"*{split}*.json*") if "pope" in path.name)
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise BenchmarkError(
            f"{folder} must hold one question file of the split {split!r} (*pope*{split}*.json); found: {listed}."
        )
    return found[0]
