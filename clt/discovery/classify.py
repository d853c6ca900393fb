"""Phase 3: which samples are clear examples of GOOD and of BAD, and how the two differ besides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clt.config.base import write_text_atomically
from clt.discovery.responses import Response
from clt.errors import DiscoveryError

MIN_SAMPLES = 10
"""Fewer per class are refused; the phase guide advises at least 50."""
ADVISED = 50


@dataclass(frozen=True)
class Balance:
    """How the classes differ in what features could pick up instead of quality."""

    n: int
    mean_length: float
    """Tokens of the answer."""
    yes_share: float
    """Share of answers that begin with yes."""


@dataclass(frozen=True)
class Classification:
    """The two lists as the phase guide prints them, and what is worth knowing about them."""

    good: tuple[dict[str, Any], ...]
    bad: tuple[dict[str, Any], ...]
    neither: int
    """Samples that are no clear example of either."""
    balance: Mapping[str, Balance]

    def save(self, path: Path, report: Path) -> None:
        """Write `{"GOOD": [...], "BAD": [...]}` and, beside it, the counts and the balance."""
        lists = {"GOOD": self.good, "BAD": self.bad}
        write_text_atomically(path, json.dumps(lists, indent=2, ensure_ascii=False) + "\n")
        balance = {name: asdict(each) for name, each in self.balance.items()}
        counts = {"GOOD": len(self.good), "BAD": len(self.bad), "neither": self.neither}
        write_text_atomically(report, json.dumps({"counts": counts, "balance": balance}, indent=2) + "\n")


def classify(
    scores: Sequence[Mapping[str, Any]],
    verdicts: Sequence[str],
    responses: Sequence[Response],
    activations: Mapping[str, Path],
    min_samples: int = MIN_SAMPLES,
) -> Classification:
    """Sort the scored samples by verdict.

    Args:
        scores: one flat object per sample, with `id`.
        verdicts: `good`, `bad` or `neither`, one per score.
        responses: the captured answers.
        activations: activation file by id.
        min_samples: how many each class must have.

    Raises:
        DiscoveryError: a class is too small, or a classified sample has no activation file.
    """
    by_id = {response.id: response for response in responses}
    classes: dict[str, list[dict[str, Any]]] = {"good": [], "bad": [], "neither": []}
    for score, verdict in zip(scores, verdicts, strict=True):
        classes[verdict].append({**score, "image": by_id[str(score["id"])].image})
    good, bad = classes["good"], classes["bad"]
    _check_sizes(len(good), len(bad), len(classes["neither"]), min_samples)
    _check_files([str(row["id"]) for row in (*good, *bad)], activations)
    balance = {name: _balance([by_id[str(row["id"])] for row in rows]) for name, rows in (("GOOD", good), ("BAD", bad))}
    return Classification(tuple(good), tuple(bad), len(classes["neither"]), balance)


def describe(classification: Classification) -> list[str]:
    """Lines for people; the last ones warn."""
    good, bad = classification.balance["GOOD"], classification.balance["BAD"]
    lines = [
        f"{good.n} GOOD, {bad.n} BAD, {classification.neither} neither",
        f"answer length {good.mean_length:.1f} and {bad.mean_length:.1f} tokens, "
        f"yes-answers {good.yes_share:.0%} and {bad.yes_share:.0%}",
    ]
    for name, each in classification.balance.items():
        if each.n < ADVISED:
            lines.append(f"only {each.n} {name} samples; the guide advises {ADVISED}, intervals will be wide")
    if abs(good.yes_share - bad.yes_share) > 0.2:
        lines.append(
            "the classes differ in how often the answer is yes; tests exchange labels only among equal answers"
        )
    return lines


def read_classification(path: Path) -> dict[str, list[dict[str, Any]]]:
    """`{"GOOD": [...], "BAD": [...]}`, ours or the seeds'.

    Raises:
        DiscoveryError: the file is damaged, a class is empty, or an id occurs twice.
    """
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DiscoveryError(f"{path} is not JSON (line {error.lineno}: {error.msg}). Was it cut off?") from None
    if not isinstance(lists, dict) or not {"GOOD", "BAD"} <= set(lists):
        raise DiscoveryError(f'{path} must be {{"GOOD": [...], "BAD": [...]}}, as `clt phase classify` writes it.')
    for name in ("GOOD", "BAD"):
        if not lists[name]:
            raise DiscoveryError(f"{path}: {name} is empty, so there is nothing to compare. Change the thresholds.")
    ids = [str(row["id"]) for name in ("GOOD", "BAD") for row in lists[name]]
    twice = sorted({id for id in ids if ids.count(id) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise DiscoveryError(f"{path} lists {len(twice)} ids more than once, among them {', '.join(twice[:3])}.")
    return lists


def _check_sizes(n_good: int, n_bad: int, n_neither: int, least: int) -> None:
    short = [name for name, n in (("GOOD", n_good), ("BAD", n_bad)) if n < least]
    if short:
        raise DiscoveryError(
            f"{n_good} GOOD, {n_bad} BAD and {n_neither} other samples: {' and '.join(short)} must have at least "
            f"{least}. Capture more samples, move the benchmark's thresholds (`clt bench info` lists its options), or "
            "lower --min-samples, knowing that little can be said of so few."
        )


def _check_files(ids: Sequence[str], activations: Mapping[str, Path]) -> None:
    missing = [id for id in ids if id not in activations or not activations[id].is_file()]
    if missing:
        raise DiscoveryError(
            f"{len(missing)} classified samples have no activation file, among them {', '.join(missing[:3])}. Run "
            "`clt phase capture` again; it fills in what is missing."
        )


def _balance(responses: Sequence[Response]) -> Balance:
    lengths = [len(response.answer_ids) for response in responses]
    yes = [says_yes(response.response) for response in responses]
    return Balance(n=len(responses), mean_length=float(np.mean(lengths)), yes_share=float(np.mean(yes)))


def says_yes(response: str) -> bool:
    """Whether an answer begins with yes."""
    return response.strip().lower().startswith("yes")
