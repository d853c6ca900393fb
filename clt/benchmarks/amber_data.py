"""AMBER's own files: annotations, associated words, safe words, queries.

Vocabulary and typos are kept verbatim: the official evaluator compares strings. Ids are positions in
`annotations.json`, counted from 1. Source: Wang et al. 2023, arXiv 2311.07397; github.com/junyangwang0410/AMBER.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from clt.benchmarks.files import fingerprint, image_files, read_json, read_rows, read_text
from clt.errors import BenchmarkError
from clt.types import Sample

GENERATIVE = "generative"
SOURCE = "Wang et al. 2023, arXiv 2311.07397; github.com/junyangwang0410/AMBER"
LICENSE = "Apache-2.0 (annotations and queries)"
EPSILON = 0.001
"""Where every denominator starts in AMBER's metrics.txt."""


class Candidate(NamedTuple):
    """A word that may be mentioned, and the annotated word (by place) that it counts for."""

    word: str
    slot: int


class Query(NamedTuple):
    """What is asked about which image."""

    text: str
    image: str


@dataclass(frozen=True)
class AmberData:
    """AMBER's `data` folder, each file read when it is first needed."""

    folder: Path

    @classmethod
    def at(cls, data: str | Path) -> AmberData:
        """The data folder itself, or `data` inside the official repository.

        Raises:
            BenchmarkError: neither holds `annotations.json`.
        """
        for folder in (Path(data), Path(data) / "data"):
            if (folder / "annotations.json").is_file():
                return cls(folder)
        raise BenchmarkError(
            f"{data} holds no annotations.json. Give the `data` folder of github.com/junyangwang0410/AMBER."
        )

    @cached_property
    def annotations(self) -> dict[str, dict[str, Any]]:
        """Annotation by id."""
        path = self.folder / "annotations.json"
        rows = read_rows(path, "AMBER annotations")
        for place, row in enumerate(rows, 1):
            if row.get("id") != place:
                raise BenchmarkError(f"{path}: entry {place} has id {row.get('id')!r}; ids are places, from 1 on.")
            if not isinstance(row.get("type"), str) or "truth" not in row:
                raise BenchmarkError(f"{path}: entry {place} lacks type or truth.")
        return {str(row["id"]): row for row in rows}

    @cached_property
    def associations(self) -> dict[str, list[str]]:
        """The words that count as each annotated word."""
        path = self.folder / "relation.json"
        table = read_json(path, "AMBER associations")
        if not isinstance(table, Mapping) or not all(isinstance(words, list) for words in table.values()):
            raise BenchmarkError(f"{path} must map each word to a list of associated words.")
        return dict(table)

    @cached_property
    def safe_words(self) -> frozenset[str]:
        """Words that are neither hallucinations nor hits."""
        return frozenset(read_text(self.folder / "safe_words.txt", "AMBER safe words").split("\n")) - {""}

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Every word that can be counted at all."""
        return frozenset(self.associations) | {word for words in self.associations.values() for word in words}

    @cached_property
    def queries(self) -> dict[str, Query]:
        """Query by id, as released in `query/query_all.json` (or in the files of its parts)."""
        folder = self.folder / "query"
        files = [folder / "query_all.json"]
        if not files[0].is_file():
            files = [folder / "query_generative.json", folder / "query_discriminative.json"]
        rows = [row for path in files for row in read_rows(path, "AMBER queries")]
        try:
            return {str(row["id"]): Query(row["query"], row["image"]) for row in rows}
        except KeyError as error:
            raise BenchmarkError(f"A row of {files[0].name} lacks {error}. Rows need id, image and query.") from None

    def candidates(self, words: list[str]) -> list[Candidate]:
        """Associated words of every annotated word first, the annotated words after them: the official order.

        Raises:
            BenchmarkError: an annotated word has no entry among the associations.
        """
        strangers = [word for word in words if word not in self.associations]
        if strangers:
            raise BenchmarkError(f"{self.folder}: {strangers[0]!r} is annotated, but relation.json has no such word.")
        associated = [Candidate(other, slot) for slot, word in enumerate(words) for other in self.associations[word]]
        return associated + [Candidate(word, slot) for slot, word in enumerate(words)]

    def fingerprints(self) -> list[dict[str, str]]:
        """The files that decide the score."""
        return [fingerprint(self.folder / name) for name in ("annotations.json", "relation.json", "safe_words.txt")]


def amber_samples(
    files: AmberData, ids: Sequence[str], images: str | Path | None, reference: Callable[[Mapping[str, Any]], str]
) -> list[Sample]:
    """The queries with these ids; `reference` makes the best answer from an annotation, which is also the `meta`.

    Raises:
        BenchmarkError: a query is missing, or images are.
    """
    missing = [id for id in ids if id not in files.queries]
    if missing:
        raise BenchmarkError(f"{files.folder / 'query'} has no query for {len(missing):,} of {len(ids):,} annotations.")
    queries = {id: files.queries[id] for id in ids}
    paths = image_files(Path(images) if images else None, (query.image for query in queries.values()))
    return [
        Sample(
            id=id,
            prompt=query.text,
            images=paths[query.image],
            meta={
                **files.annotations[id],
                "image": query.image,
                "reference": reference(files.annotations[id]),
            },
        )
        for id, query in queries.items()
    ]


def of_this_task(responses: Mapping[str, str], ids: Collection[str], files: AmberData) -> tuple[dict[str, str], int]:
    """The responses to the given ids and to ids AMBER does not have (an error later), and how many are other tasks'.

    Raises:
        BenchmarkError: all of them are.
    """
    wanted = set(ids)
    ours = {id: text for id, text in responses.items() if id in wanted or id not in files.annotations}
    if responses and not ours:
        raise BenchmarkError(
            f"All {len(responses):,} responses belong to other tasks of AMBER. Choose theirs with --task: generative, "
            "discriminative, existence, attribute or relation."
        )
    return ours, len(responses) - len(ours)


def percent(part: float, whole: float, digits: int | None) -> float:
    """A share in percent with AMBER's 0.001 in the denominator."""
    share = part / (whole + EPSILON) * 100
    return share if digits is None else round(share, digits)
