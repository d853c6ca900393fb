"""Counts of groups that are right only as a whole (the questions about one figure, the pair about one image).

To keep scores sums over samples, the group's count stands at the first of its scored samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from clt.benchmarks.base import SampleScore


def with_group_counts(
    scores: Sequence[SampleScore], group_of: Mapping[str, Hashable], name: str
) -> tuple[SampleScore, ...]:
    """The scores with `NAME` and `NAME_right` (all members right) counted at each group's first member.

    Args:
        scores: whose counts say `right`.
        group_of: group by sample id; samples without one are in no group.
        name: of the counts.
    """
    right: dict[Hashable, bool] = {}
    for score in scores:
        if score.id in group_of:
            group = group_of[score.id]
            right[group] = right.get(group, True) and bool(score.counts["right"])
    counted: set[Hashable] = set()
    result: list[SampleScore] = []
    for score in scores:
        group = group_of.get(score.id)
        is_first = score.id in group_of and group not in counted
        counted.add(group)
        more = {name: int(is_first), f"{name}_right": int(is_first and right[group])}
        result.append(replace(score, counts={**score.counts, **more}))
    return tuple(result)


def n_incomplete(scores: Sequence[SampleScore], group_of: Mapping[str, Hashable]) -> int:
    """How many groups with a scored member lack the score of another."""
    scored = {score.id for score in scores}
    groups = {group_of[id] for id in scored if id in group_of}
    return len({group for id, group in group_of.items() if group in groups and id not in scored})
