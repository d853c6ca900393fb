"""COCO's object classes in running text: synonyms, plurals and the double words that mean something else.

A closed list of synonyms needs no lemmatizer: each word's plural follows from rules and a few exceptions.

Source: Rohrbach et al. 2018, arXiv 1809.02156, and the released script's order of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clt.benchmarks.files import read_text
from clt.benchmarks.nouns import sentences
from clt.errors import BenchmarkError

IRREGULAR_PLURALS = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "mouse": "mice",
    "goose": "geese",
    "knife": "knives",
    "shelf": "shelves",
    "calf": "calves",
    "loaf": "loaves",
    "ox": "oxen",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
}
YOUNG_AND_OLD = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
"""Kinds in "baby bear" and "adult bear", where baby and adult are no persons."""
PASSENGER = ("jet", "train")
SPECIAL_PAIRS = {"bow tie": "tie", "toilet seat": "toilet", "home plate": "", "train track": ""}
"""Two words that count as one class, or as none."""


@dataclass(frozen=True)
class ObjectNames:
    """The class of every word or pair of words that names an object."""

    classes: Mapping[str, str]
    """Class by synonym, in the singular."""
    singulars: Mapping[str, str]
    """Singular by surface, of every word that a synonym is made of."""

    @classmethod
    def read(cls, path: Path) -> ObjectNames:
        """Read a list of synonyms: one class per line, names separated by commas, the class first.

        Raises:
            BenchmarkError: the file is missing or empty, or a name belongs to two classes.
        """
        classes: dict[str, str] = {}
        for number, line in enumerate(read_text(path, "synonyms").split("\n"), 1):
            names = [name.strip().lower() for name in line.split(",") if name.strip()]
            for name in names:
                if classes.setdefault(name, names[0]) != names[0]:
                    raise BenchmarkError(f"{path}, line {number}: {name!r} belongs to {classes[name]!r} already.")
        if not classes:
            raise BenchmarkError(f"{path} holds no synonyms: one class per line, names separated by commas.")
        words = {word for name in (*classes, *SPECIAL_PAIRS, *YOUNG_AND_OLD, *PASSENGER) for word in name.split()}
        singulars = {plural(word): word for word in sorted(words)} | {word: word for word in words}
        return cls(classes, singulars)

    def class_of(self, name: str) -> str:
        """The class of one of COCO's category names.

        Raises:
            BenchmarkError: the synonyms do not know it.
        """
        if name.lower() not in self.classes:
            raise BenchmarkError(
                f"The synonyms do not know COCO's category {name!r}. Is it the list of CHAIR's authors?"
            )
        return self.classes[name.lower()]

    def mentioned(self, text: str) -> list[str]:
        """The classes that a text names, in order, repetitions kept."""
        tokens = [token for sentence in sentences(text.lower()) for token in sentence]
        words = self._merged([self.singulars.get(token, token) for token in tokens])
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [self.classes[word] for word in words if word in self.classes]

    def _merged(self, words: list[str]) -> list[str]:
        """Neighbouring words that are a name together, from left to right."""
        merged: list[str] = []
        place = 0
        while place < len(words):
            pair = self._pair(" ".join(words[place : place + 2])) if place + 1 < len(words) else None
            merged.append(words[place] if pair is None else pair)
            place += 1 if pair is None else 2
        return merged

    def _pair(self, pair: str) -> str | None:
        """What two words mean together; None if they are just two words."""
        if pair in SPECIAL_PAIRS:
            return SPECIAL_PAIRS[pair]
        first, second = pair.split()
        if (first in ("baby", "adult") and second in YOUNG_AND_OLD) or (first == "passenger" and second in PASSENGER):
            return second
        return pair if pair in self.classes else None


def plural(word: str) -> str:
    """The plural of an English noun."""
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("tomato", "potato")) else f"{word}s"
