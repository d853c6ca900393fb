"""CHAIR and Object HalBench: which COCO objects a caption names that are not in the image.

Needs COCO's own `instances_*.json` and `captions_*.json`, and the list of synonyms that CHAIR's authors released (one
line per class, the class first). True objects are the annotated instances and what the reference captions name.

Source: Rohrbach et al. 2018, "Object Hallucination in Image Captioning", arXiv 1809.02156 (CHAIR); Yu et al. 2023,
"RLHF-V", arXiv 2312.00849 (Object HalBench).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clt.benchmarks.base import About, CountingBenchmark, SampleScore, Verdict, few, ratio
from clt.benchmarks.coco_objects import ObjectNames
from clt.benchmarks.files import fingerprint, image_files, read_json, read_rows, text_of, unique
from clt.config.base import require_positive
from clt.errors import BenchmarkError
from clt.types import Sample


@dataclass(frozen=True, kw_only=True)
class Chair(CountingBenchmark):
    """Captions of COCO images: share of captions and of mentions that are hallucinated, and objects found.

    chair_s = captions with a hallucinated object / captions; chair_i = hallucinated mentions / mentions, repetitions
    counted; recall = true objects named / true objects. Words are brought to their singular by rules for the closed
    list of synonyms; the released scripts use three different lemmatizers that disagree on rare words.
    """

    data: str | Path
    """Folder with COCO's instances and captions annotation files."""
    synonyms: str | Path
    """CHAIR's synonyms.txt."""
    images: str | Path | None = None
    """Folder of the images; needed to ask, not to score."""
    n: int | None = 500
    """How many images, drawn with the seed; None: all."""
    seed: int = 0
    """Of the drawing."""
    prompt: str = "Please describe this image in detail."
    """What is asked."""

    about = About(
        name="chair",
        summary="COCO captions: objects named that are not there (chair_s, chair_i)",
        source="Rohrbach et al. 2018, arXiv 1809.02156",
        license="COCO's annotations: CC-BY-4.0",
        higher_is_better={"chair_i": False, "chair_s": False, "recall": True},
    )

    def __post_init__(self) -> None:
        require_positive("Chair", n=self.n)

    @cached_property
    def _names(self) -> ObjectNames:
        return ObjectNames.read(Path(self.synonyms))

    @cached_property
    def _files(self) -> dict[str, Path]:
        return {kind: _only(Path(self.data), f"{kind}_*.json") for kind in ("instances", "captions")}

    @cached_property
    def _truth(self) -> dict[str, tuple[str, frozenset[str]]]:
        """File name and true classes by image id."""
        instances = _coco(self._files["instances"])
        captions = _coco(self._files["captions"])
        classes = {row["id"]: self._names.class_of(row["name"]) for row in instances["categories"]}
        objects: dict[int, set[str]] = {row["id"]: set() for row in instances["images"]}
        for row in instances["annotations"]:
            objects[row["image_id"]].add(classes[row["category_id"]])
        for row in captions["annotations"]:
            if row["image_id"] in objects:
                objects[row["image_id"]].update(self._names.mentioned(row["caption"]))
        return {str(row["id"]): (row["file_name"], frozenset(objects[row["id"]])) for row in instances["images"]}

    def samples(self) -> Sequence[Sample]:
        """One request per image; `meta` has the image's file name and its true objects."""
        return self._samples

    @cached_property
    def _samples(self) -> list[Sample]:
        asked = self._asked()
        paths = image_files(Path(self.images) if self.images else None, (self._truth[id][0] for id in asked))
        return [self._sample(id, prompt, paths[self._truth[id][0]]) for id, prompt in asked.items()]

    def _asked(self) -> dict[str, str]:
        """Prompt by image id."""
        ids = sorted(self._truth, key=int)
        if self.n is not None and self.n < len(ids):
            chosen = np.random.default_rng(self.seed).choice(len(ids), size=self.n, replace=False)
            ids = [ids[place] for place in sorted(chosen)]
        return dict.fromkeys(ids, self.prompt)

    def count(self, sample: Sample, response: str) -> SampleScore:
        """Mentions, hallucinated mentions, and which true objects were named."""
        mentions, truth = self._names.mentioned(response), set(sample.meta["objects"])
        invented = [name for name in mentions if name not in truth]
        counts = {
            "captions": 1,
            "with_invention": int(bool(invented)),
            "with_object": int(bool(mentions)),
            "mentions": len(mentions),
            "hallucinated": len(invented),
            "found": len(truth & set(mentions)),
            "objects": len(truth),
            "words": len(response.split()),
        }
        return SampleScore(id=sample.id, counts=counts, details={"mentioned": mentions, "invented": invented})

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """CHAIR's two shares and recall, as fractions."""
        return {
            "chair_s": ratio(totals["with_invention"], totals["captions"]),
            "chair_i": ratio(totals["hallucinated"], totals["mentions"]),
            "recall": ratio(totals["found"], totals["objects"]),
        }

    def notes(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """The extractor, the files, and metrics without denominator."""
        files = (*self._files.values(), Path(self.synonyms))
        return {
            "extractor": "synonyms with rules for plurals",
            "n_without_objects": totals["captions"] - totals["with_object"],
            "undefined": [] if totals["mentions"] else ["chair_i"],
            **dict.fromkeys(("similarity", "judge"), "not used"),
            "data": [fingerprint(path) for path in files],
        }

    def verdict(self, score: SampleScore) -> Verdict:
        """Bad: something invented; good: nothing invented and at least half of the objects found."""
        if score.counts["hallucinated"]:
            return "bad"
        return "good" if score.counts["found"] >= max(score.counts["objects"] / 2, 1) else "neither"

    def _sample(self, id: str, prompt: str, images: tuple[Path, ...]) -> Sample:
        name, objects = self._truth[id]
        reference = f"There is {', '.join(sorted(objects))}." if objects else "There is nothing."
        meta = {"image": name, "objects": sorted(objects), "reference": reference}
        return Sample(id=id, prompt=prompt, images=images, meta=meta)


@dataclass(frozen=True, kw_only=True)
class ObjectHalBench(Chair):
    """Object HalBench's numbers: share of object-naming responses with a hallucination, and of mentions.

    response_hallucination = responses with a hallucinated object / responses that name any COCO object;
    object_hallucination = hallucinated mentions / mentions. Published numbers let GPT-3.5 list the objects first; this
    is the variant without it.
    """

    questions: str | Path | None = None
    """JSON lines of `image_id` and `question`; None: the prompt, for images drawn with the seed."""
    n: int | None = 300
    """How many images, if no questions are given."""

    about = replace(
        Chair.about,
        name="object-halbench",
        summary="COCO descriptions: responses and mentions with hallucinated objects",
        source="Yu et al. 2023, arXiv 2312.00849; github.com/RLHF-V/RLHF-V",
        higher_is_better={"response_hallucination": False, "object_hallucination": False, "recall": True},
    )

    def _asked(self) -> dict[str, str]:
        if self.questions is None:
            return super()._asked()
        where = str(self.questions)
        rows = read_rows(Path(self.questions), "Object HalBench questions")
        ids = unique((str(int(text_of(row, ("image_id",), where))) for row in rows), where)
        missing = [id for id in ids if id not in self._truth]
        if missing:
            raise BenchmarkError(f"{where}: {len(missing):,} images are not in {self.data}: {few(missing)}.")
        return {id: text_of(row, ("question", "prompt", "text"), where) for id, row in zip(ids, rows)}

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The two hallucination rates, recall, and the mean length in words."""
        return {
            "response_hallucination": ratio(totals["with_invention"], totals["with_object"]),
            "object_hallucination": ratio(totals["hallucinated"], totals["mentions"]),
            "recall": ratio(totals["found"], totals["objects"]),
            "mean_words": ratio(totals["words"], totals["captions"]),
        }

    def notes(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """As CHAIR's; without any mention both rates are undefined."""
        undefined = [] if totals["mentions"] else ["response_hallucination", "object_hallucination"]
        return {**super().notes(totals), "undefined": undefined}


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise BenchmarkError(f"{folder} must hold one file {pattern}; it holds {len(found)}. Get COCO's annotations.")
    return found[0]


def _coco(path: Path) -> dict[str, Any]:
    table = read_json(path, "COCO annotations")
    if not isinstance(table, dict) or not isinstance(table.get("annotations"), list):
        raise BenchmarkError(f"{path} is no COCO annotation file: it has no list of annotations.")
    return table
