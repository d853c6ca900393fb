"""Finding the objects that a text mentions, from a closed vocabulary: a table of surfaces, and rules of context.

The official evaluators tag parts of speech and lemmatise with WordNet. In a closed vocabulary both shrink: a table says
which surface belongs to which word (exactly as WordNet's rules do), and only the few words that are also verbs or
adjectives need a look at their neighbours. `nouns_nltk.py` has the official route for who has NLTK's data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, Protocol, runtime_checkable

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_BREAKS = re.compile(r"\.{2,}|--|[;@#$%&?!*\"“”„«»‘’`()\[\]{}<>]|[:,](?=\D|$)|\.(?=[\])}>\"'»”’ ]*$)")
_CLITIC = re.compile(r"(?<=\w)(?:n't|'(?:s|m|d|ll|re|ve)?)(?=\s|$)", re.IGNORECASE)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEVER_NOUNS = frozenset({"can", "hot"})
"""Tagged as modal and adjective wherever they stand; the object `can` is only reached as `cans`."""
ADJECTIVES_AFTER_A = frozenset({"net", "urinal"})
"""Nouns that the official tagger takes for adjectives in "a net": on newspaper text it learned "a net loss"."""
VERBS = _words(
    "board book brush drain drink fence file fish grill light line lock lounge monitor note pack paddle range ring "
    "signal sink skate ski spray support switch tap tape tie train watch water wire"
)
"""Nouns of the vocabulary that texts about images also use as verbs."""
BEFORE_VERBS = _words("to can could will would may might must should i you we they who not n't")
BEFORE_TO = _words(
    "next close closer due thanks adjacent attached connected compared addition similar tied leading leads access"
)
"""Behind these, `to` is a preposition: "next to water"."""
THIRD_PERSON = _words("boards drinks houses lights lines monitors rings signals skates skis supports watches")
DETERMINERS = _words("a an the this that these those his her its their my your our some any each every no both another")
OBJECT_STARTS = _words("a an the his her its their my your our both either each him them it")
"""What follows a verb; not `that`, which follows nouns: "a building that has ..."."""
PREPOSITIONS = _words(
    "across along around at away behind by down from in into near off on out over past through to toward towards "
    "under up with"
)
GERUNDS = _words("sailing drawing painting building")
BE = _words("is are was were be been being")
COLOURS = _words("beige black blue brown colored coloured cream gray green grey orange pink purple red white yellow")
LINKING = BE | _words("very bright dark light vibrant")
SMALL_WORDS = _words("and or but as of for while which who that not also there it they he she we with")


@runtime_checkable
class NounExtractor(Protocol):
    """A plug-in that finds what a text mentions."""

    def __call__(self, text: str) -> list[str]:
        """The words of the vocabulary that the text mentions, in order, repetitions kept."""
        ...

    def describe(self) -> dict[str, Any]:
        """For the provenance of a number."""
        ...


class VocabularyRules:
    """A table from surfaces to vocabulary words, and rules for surfaces that are no nouns where they stand.

    Args:
        lemmas: vocabulary word by surface, letter case as written in texts.
    """

    def __init__(self, lemmas: Mapping[str, str]) -> None:
        self._lemmas = lemmas

    def __call__(self, text: str) -> list[str]:
        """The vocabulary words in order, repetitions kept."""
        return [
            self._lemmas[token]
            for sentence in sentences(text)
            for place, token in enumerate(sentence)
            if token in self._lemmas and is_noun(sentence, place)
        ]

    def describe(self) -> dict[str, Any]:
        """Its name and the size of the table."""
        return {"extractor": "rules", "n_surfaces": len(self._lemmas)}


def amber_lemmas() -> dict[str, str]:
    """AMBER's word by surface: every form that WordNet's noun rules (3.0) reduce to one of AMBER's words."""
    text = files("clt.benchmarks").joinpath("assets/amber_lemmas.json").read_text(encoding="utf-8")
    return json.loads(text)


def reachable_words() -> frozenset[str]:
    """The words of AMBER that some text can mention: those with a surface that is a noun somewhere."""
    return frozenset(word for surface, word in amber_lemmas().items() if surface not in NEVER_NOUNS)


def sentences(text: str) -> Iterator[list[str]]:
    """Tokens of each sentence, cut as Penn Treebank tokenizers do: hyphens stay, clitics and punctuation come off."""
    for sentence in _SENTENCE_END.split(text.strip()):
        spaced = _BREAKS.sub(lambda match: f" {match.group()} ", sentence)
        yield _CLITIC.sub(lambda match: f" {match.group()}", spaced).split()


def is_noun(sentence: Sequence[str], place: int) -> bool:
    """Whether the vocabulary word at that place is used as a noun there, by its neighbours."""
    word = sentence[place]
    before, after = _neighbour(sentence, place - 1), _neighbour(sentence, place + 1)
    if word in NEVER_NOUNS or (word == "leave" and before not in DETERMINERS):
        return False
    if word in VERBS and _is_base_verb(sentence, place, before, after):
        return False
    is_subject = before in ("that", "which", "who") or _could_be_noun(before)
    if word in THIRD_PERSON and is_subject and after in OBJECT_STARTS:
        return False
    if word in GERUNDS and before not in DETERMINERS and _is_gerund(word, before, after):
        return False
    return not _is_adjective(word, before, after, _neighbour(sentence, place + 2))


def _is_base_verb(sentence: Sequence[str], place: int, before: str, after: str) -> bool:
    """`to watch`, `they ski`, `people watch the game`, `trees line both sides`."""
    if before == "to":
        return _neighbour(sentence, place - 2) not in BEFORE_TO
    return before in BEFORE_VERBS or (_is_plural(before) and after in OBJECT_STARTS)


def _is_gerund(word: str, before: str, after: str) -> bool:
    """`is sailing`, `boats sailing on`, `drawing attention`."""
    return (
        before in BE or after in OBJECT_STARTS or (word == "sailing" and after in PREPOSITIONS) or after == "attention"
    )


def _is_adjective(word: str, before: str, after: str, second: str) -> bool:
    """`an orange cat`, `light blue`, `individual pieces`."""
    if word == "orange":
        colour = second if after == "and" else after
        return before in LINKING or colour in COLOURS or (before != "of" and _could_be_noun(after))
    if word == "light":
        return after in COLOURS
    if word in ADJECTIVES_AFTER_A:
        return before in ("a", "an")
    is_person = before in ("a", "an") or after.endswith("ing")
    return word == "individual" and _could_be_noun(after) and not is_person


def _neighbour(sentence: Sequence[str], place: int) -> str:
    return sentence[place].lower() if 0 <= place < len(sentence) else ""


def _is_plural(word: str) -> bool:
    is_regular = word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return is_regular or word in ("people", "men", "women", "children")


def _could_be_noun(word: str) -> bool:
    """A word that is neither punctuation nor one of the small words we know."""
    return word.isalpha() and word not in DETERMINERS | PREPOSITIONS | BE | SMALL_WORDS
