"""Scores of the shapes world: POPE for yes/no questions, AMBER's generative part for descriptions.

Everything is computed from counts per sample, which callers may keep for intervals. All values are percentages
except the counts `n`, `n_*` and `unparsed`.

Sources: Li et al. 2023 (POPE); Wang et al. 2023 (AMBER), whose code pools counts over responses as we do. Cog is
the paper's: the share of mentions that are hallucination targets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from clt.benchmarks.yes_no import cell_or_unread, confusion_metrics, first_word
from clt.errors import WorldError
from clt.types import Sample
from clt.worlds.shapes.scene import KINDS
from clt.worlds.shapes.text import CATEGORIES

_WORD = re.compile(r"[a-z]+")


class QuestionCount(NamedTuple):
    """One yes/no response: what was right and what was said (None: neither yes nor no)."""

    id: str
    category: str
    is_yes: bool
    said_yes: bool | None

    @property
    def is_correct(self) -> bool:
        """An answer that is neither yes nor no is wrong."""
        return self.said_yes == self.is_yes


class DescriptionCount(NamedTuple):
    """One description: how many objects were mentioned, invented, expected and found."""

    id: str
    mentions: int
    hallucinated: int
    truth: int
    covered: int
    targeted: int
    """Mentions that are in the list of hallucination targets."""


def mentioned(response: str) -> list[str]:
    """The kinds a response names, in order, repetitions kept as AMBER keeps them."""
    return [word for word in _WORD.findall(response.lower()) if word in KINDS]


def count_questions(samples: Sequence[Sample], responses: Sequence[str]) -> list[QuestionCount]:
    """Each response beside the truth."""
    _check_lengths(samples, responses)
    return [
        QuestionCount(sample.id, sample.meta["category"], sample.meta["label"] == "yes", first_word(response))
        for sample, response in zip(samples, responses)
    ]


def count_descriptions(samples: Sequence[Sample], responses: Sequence[str]) -> list[DescriptionCount]:
    """Each description's mentions beside the truth."""
    _check_lengths(samples, responses)
    return [_count_description(sample, response) for sample, response in zip(samples, responses)]


def _count_description(sample: Sample, response: str) -> DescriptionCount:
    truth, targets = set(sample.meta["truth"]), set(sample.meta["hallucination_targets"])
    mentions = mentioned(response)
    return DescriptionCount(
        id=sample.id,
        mentions=len(mentions),
        hallucinated=sum(kind not in truth for kind in mentions),
        truth=len(truth),
        covered=len(truth & set(mentions)),
        targeted=sum(kind in targets for kind in mentions),
    )


def pope_scores(counts: Sequence[QuestionCount]) -> dict[str, Any]:
    """POPE's numbers over all questions, and again per way of choosing the negatives (positive class: yes)."""
    categories = {
        category: _pope_scores([count for count in counts if count.category == category]) for category in CATEGORIES
    }
    return {**_pope_scores(counts), "categories": categories}


def _pope_scores(counts: Sequence[QuestionCount]) -> dict[str, float | int]:
    totals = Counter[str]()
    for count in counts:
        totals.update(cell_or_unread(count.said_yes, count.is_yes))
    return {
        **{name: 100 * share for name, share in confusion_metrics(totals).items()},
        "unparsed": sum(count.said_yes is None for count in counts),
        "n": len(counts),
    }


def amber_scores(counts: Sequence[DescriptionCount]) -> dict[str, float | int]:
    """AMBER's generative numbers: invented mentions, truth covered, responses with any invention, targets hit."""
    mentions = sum(count.mentions for count in counts)
    return {
        "chair": percent(sum(count.hallucinated for count in counts), mentions),
        "cover": percent(sum(count.covered for count in counts), sum(count.truth for count in counts)),
        "hal": percent(sum(count.hallucinated > 0 for count in counts), len(counts)),
        "cog": percent(sum(count.targeted for count in counts), mentions),
        "n": len(counts),
        "n_mentions": mentions,
    }


def percent(part: float, whole: float) -> float:
    """A share in percent; 0 where there is nothing to share."""
    return 100.0 * part / whole if whole else 0.0


def _check_lengths(samples: Sequence[Sample], responses: Sequence[str]) -> None:
    if len(samples) != len(responses):
        raise WorldError(
            f"{len(responses):,} responses for {len(samples):,} samples. Each sample needs one response, in order."
        )
