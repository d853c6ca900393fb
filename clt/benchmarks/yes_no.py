"""Yes/no answers: how they are read, and the numbers made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from clt.benchmarks.base import ratio

_WORD = re.compile(r"[a-z]+")
POPE_NO = ("No", "not", "no")
CELLS = ("tp", "fp", "tn", "fn")


def first_word(response: str) -> bool | None:
    """True for yes, False for no, by the first word whatever its case; None when it is neither."""
    words = _WORD.findall(response.lower())
    if not words or words[0] not in ("yes", "no"):
        return None
    return words[0] == "yes"


def pope_rule(response: str) -> bool:
    """POPE's own reading: no if `No`, `not` or `no` is a word of the first sentence, otherwise yes.

    The sentence ends at the first full stop, commas are dropped, words are what single spaces separate. So an empty
    answer, `NO`, `No!` and `none` all read as yes; `says_neither` tells how often that was a guess.

    Source: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models", the released evaluator.
    """
    words = response.split(".")[0].replace(",", "").split(" ")
    return not any(no in words for no in POPE_NO)


def says_neither(response: str) -> bool:
    """Whether POPE's rule reads yes from an answer in which no word is yes."""
    return pope_rule(response) and "yes" not in _WORD.findall(response.lower())


def cell(said_yes: bool, is_yes: bool) -> dict[str, int]:
    """The response's place in the confusion table, positive = yes: one 1 and three 0."""
    place = ("t" if said_yes == is_yes else "f") + ("p" if said_yes else "n")
    return {name: int(name == place) for name in CELLS}


def cell_or_unread(said_yes: bool | None, is_yes: bool) -> dict[str, int]:
    """Like `cell`, with an answer that is neither: a missed yes, or `unread` where no was right. Both are wrong."""
    is_unread = said_yes is None and not is_yes
    cells = dict.fromkeys(CELLS, 0) if is_unread else cell(bool(said_yes), is_yes)
    return cells | {"unread": int(is_unread)}


def confusion_metrics(totals: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes, as fractions, unrounded; 0 where nothing was divided by."""
    tp, fp, tn, fn = (totals.get(prefix + name, 0) for name in CELLS)
    n = tp + fp + tn + fn + totals.get(f"{prefix}unread", 0)
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        f"{prefix}accuracy": ratio(tp + tn, n),
        f"{prefix}precision": precision,
        f"{prefix}recall": recall,
        f"{prefix}f1": ratio(2 * precision * recall, precision + recall),
        f"{prefix}yes_ratio": ratio(tp + fp, n),
    }


def undefined_metrics(totals: Mapping[str, float], prefix: str = "") -> list[str]:
    """The metrics that `confusion_metrics` gives as 0 because their denominator is."""
    tp, fp, _, fn = (totals.get(prefix + name, 0) for name in CELLS)
    denominators = {"precision": tp + fp, "recall": tp + fn, "f1": tp}
    return [prefix + name for name, denominator in denominators.items() if not denominator]
