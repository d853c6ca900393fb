"""How AMBER credits the objects that one description mentions.

Source: Wang et al. 2023, arXiv 2311.07397; the order of the steps is that of the released evaluator, because it decides
which annotated word a mention counts for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from clt.benchmarks.amber_data import Candidate
from clt.benchmarks.similarity import Similarity


class Annotated(NamedTuple):
    """What is in an image and what one would wrongly expect there, as candidates for mentions."""

    truth: Sequence[Candidate]
    hallucination: Sequence[Candidate]
    safe_words: frozenset[str]


class Credits(NamedTuple):
    """What a description's mentions did."""

    hallucinated: list[str]
    """Mentions that are neither there nor safe, repetitions kept."""
    truth: set[int]
    """Places of the annotated words that were covered."""
    hallucination: set[int]
    """Places of the hallucination targets that were hit."""


def credit(mentions: Iterable[str], annotated: Annotated, similar: Similarity) -> Credits:
    """Follow each mention through the evaluator's steps.

    Safe words count for nothing. A word among the truth candidates covers the first that is equal to it. Any other
    word hits the first equal and then the first similar hallucination candidate, and is still no hallucination when
    a truth candidate is similar.
    """
    credits = Credits([], set(), set())
    for mention in mentions:
        if mention in annotated.safe_words:
            continue
        there = _first_equal(mention, annotated.truth)
        if there is not None:
            credits.truth.add(there)
            continue
        expected = (_first_equal(mention, annotated.hallucination), _first(mention, annotated.hallucination, similar))
        credits.hallucination.update(slot for slot in expected if slot is not None)
        like = _first(mention, annotated.truth, similar)
        if like is None:
            credits.hallucinated.append(mention)
        else:
            credits.truth.add(like)
    return credits


def attainable(words: Iterable[str], annotated: Annotated, neighbours: Mapping[str, Collection[str]]) -> int:
    """How many annotated words a description covers that mentions all of `words`.

    Args:
        words: what can be mentioned at all.
        annotated: of one image.
        neighbours: for each word the other words that count as the same.
    """
    equal: dict[str, int] = {}
    for candidate in annotated.truth:
        equal.setdefault(candidate.word, candidate.slot)
    covered = set()
    for word in set(words) - annotated.safe_words:
        if word in equal:
            covered.add(equal[word])
        elif neighbours[word]:
            near = neighbours[word]
            covered.update([candidate.slot for candidate in annotated.truth if candidate.word in near][:1])
    return len(covered)


def _first_equal(mention: str, candidates: Sequence[Candidate]) -> int | None:
    return next((candidate.slot for candidate in candidates if candidate.word == mention), None)


def _first(mention: str, candidates: Sequence[Candidate], similar: Similarity) -> int | None:
    return next((candidate.slot for candidate in candidates if similar(mention, candidate.word)), None)
