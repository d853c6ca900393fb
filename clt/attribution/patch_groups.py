"""Patches of an image that look the same to the decoder, as one node.

Sky, walls and tables fill most of an image with embeddings that hardly differ, and each would be a node of its own with
a sliver of the effect. Grouped, the first patch of a group stands for all: its embedding and error nodes have the sums
of the members' effects, exactly, and theirs are empty. Features are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from clt.attribution.graph import Position


def with_groups(
    positions: Sequence[Position], embeddings: Float[Tensor, "position d_model"], at_least: float
) -> list[Position]:
    """Positions, those of image patches with the group they are in.

    A patch joins the first group, in reading order, of its own image whose first patch it is at least so similar to (by
    cosine of what enters the decoder), so all members are that close to the one that stands for them.
    """
    directions = torch.nn.functional.normalize(embeddings.float(), dim=1)
    leaders: dict[int, list[int]] = {}
    grouped = []
    for number, position in enumerate(positions):
        if position.patch is None:
            grouped.append(position)
            continue
        known = leaders.setdefault(position.patch.image, [])
        cosines = directions[known] @ directions[number]
        close = (cosines >= at_least).nonzero()
        leader = known[int(close[0])] if len(close) else number
        if leader == number:
            known.append(number)
        grouped.append(replace(position, group=leader))
    return grouped


def leaders_of(positions: Sequence[Position]) -> list[int]:
    """For each position the one whose nodes have its effects."""
    return [number if position.group is None else position.group for number, position in enumerate(positions)]
