"""Whether two words mean nearly the same: identity, a table in a file, or spaCy's word vectors.

AMBER's official evaluator asks spaCy's `en_core_web_lg` and takes words as the same above a similarity of 0.8. Its
vocabulary is closed, so a table made once (`clt bench similarity`) gives the same numbers without the model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clt.benchmarks.files import fingerprint, read_json
from clt.config.base import write_text_atomically
from clt.errors import BenchmarkError

SIMILARITIES = ("identity", "file", "spacy")
THRESHOLD = 0.8
"""AMBER's; words are the same strictly above it."""
SPACY_MODEL = "en_core_web_lg"


@runtime_checkable
class Similarity(Protocol):
    """A plug-in that says which words count as the same."""

    def __call__(self, word: str, other: str) -> bool:
        """Whether the two count as the same; a word is always the same as itself."""
        ...

    def describe(self) -> dict[str, Any]:
        """For the provenance of a number."""
        ...


@dataclass(frozen=True)
class Identity:
    """Equal strings only."""

    def __call__(self, word: str, other: str) -> bool:
        """Whether they are equal."""
        return word == other

    def describe(self) -> dict[str, Any]:
        """Its name."""
        return {"similarity": "identity"}


@dataclass(frozen=True)
class SimilarityTable:
    """Pairs from a file that `clt bench similarity` wrote, or any JSON of the form `{"pairs": [[word, word], ...]}`."""

    path: Path
    pairs: frozenset[frozenset[str]] = field(repr=False)
    made_with: str

    @classmethod
    def read(cls, path: Path) -> SimilarityTable:
        """Read the file.

        Raises:
            BenchmarkError: it is missing or has another form.
        """
        table = read_json(path, "similarity table; `clt bench similarity` makes one")
        pairs = table.get("pairs") if isinstance(table, Mapping) else None
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise BenchmarkError(f'{path} is no similarity table: it must be {{"pairs": [["word", "word"], ...]}}.')
        return cls(path, frozenset(frozenset(map(str, pair)) for pair in pairs), str(table.get("made_with", "unknown")))

    def __call__(self, word: str, other: str) -> bool:
        """Whether they are equal or a pair of the table, either way round."""
        return word == other or frozenset((word, other)) in self.pairs

    def describe(self) -> dict[str, Any]:
        """Its name, its file, and what the file says it was made with."""
        return {"similarity": "file", "similarity_file": fingerprint(self.path), "made_with": self.made_with}


class SpacySimilarity:
    """Cosine similarity of spaCy's vectors above AMBER's threshold; each pair is computed once.

    Raises:
        BenchmarkError: spaCy or the model is not installed, or the model has no word vectors.
    """

    def __init__(self, model: str = SPACY_MODEL, threshold: float = THRESHOLD) -> None:
        self._model, self._threshold = model, threshold
        self._nlp = _load_spacy(model)
        self._documents: dict[str, Any] = {}
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, word: str, other: str) -> bool:
        """Whether the similarity is above the threshold."""
        if (word, other) not in self._known:
            with warnings.catch_warnings():
                # spaCy warns for words without a vector; their similarity is 0, as in the official evaluator.
                warnings.simplefilter("ignore", UserWarning)
                near = self._document(word).similarity(self._document(other)) > self._threshold
            self._known[word, other] = bool(near)
        return self._known[word, other]

    def describe(self) -> dict[str, Any]:
        """Its name, the model and the threshold."""
        version = f"{self._model} {self._nlp.meta.get('version', '')}".strip()
        return {"similarity": "spacy", "similarity_model": version, "threshold": self._threshold}

    def _document(self, word: str) -> Any:
        if word not in self._documents:
            self._documents[word] = self._nlp(word)
        return self._documents[word]


def similarity(name: str, path: Path) -> Similarity:
    """The plug-in of that name (one of `SIMILARITIES`); `path` is the table of `file`."""
    if name == "identity":
        return Identity()
    if name == "spacy":
        return SpacySimilarity()
    return SimilarityTable.read(path)


def write_table(path: Path, words: Collection[str], similar: Similarity) -> int:
    """Ask for every pair of different words and write those that count as the same; how many there are."""
    ordered = sorted(words)
    pairs = [
        [word, other] for place, word in enumerate(ordered) for other in ordered[place + 1 :] if similar(word, other)
    ]
    made_with = ", ".join(f"{key} {value}" for key, value in similar.describe().items())
    write_text_atomically(path, json.dumps({"made_with": made_with, "words": len(ordered), "pairs": pairs}) + "\n")
    return len(pairs)


def _load_spacy(model: str) -> Any:
    if find_spec("spacy") is None:
        raise BenchmarkError(
            "similarity = 'spacy' needs spaCy: `pip install spacy` and `python -m spacy download en_core_web_lg`.\n"
            "Without it use --similarity identity, or a table that was made elsewhere with --similarity file."
        )
    import spacy  # pyright: ignore[reportMissingImports]

    try:
        nlp = spacy.load(model)
    except OSError as error:
        raise BenchmarkError(
            f"spaCy has no model {model!r} ({error}). Get it with `python -m spacy download {model}`."
        ) from None
    if nlp.vocab.vectors.shape[0] == 0:
        raise BenchmarkError(f"spaCy's model {model!r} has no word vectors. AMBER's numbers need en_core_web_lg.")
    return nlp
