"""What a graph explains: logits, differences of logits, or any direction at the end of the decoder.

A logit's direction is its unembedding row minus the mean row, so that the graph explains the logit minus the mean
logit; softmax does not see that shift. Source: circuit-tracer 0.4.1, `compute_salient_logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from clt.attribution.graph import TargetNode
from clt.attribution.options import AttributionOptions
from clt.errors import GraphError
from clt.lm.linear import LinearHost


@dataclass(frozen=True)
class Direction:
    """Anything linear in what the unembedding reads."""

    text: str
    vector: Float[Tensor, " d_model"]
    weight: float = 1.0
    """Its weight in every influence."""


@dataclass(frozen=True)
class Contrast:
    """The logit of one token minus that of another; each a token id or a text that is one token."""

    token: int | str
    minus: int | str
    weight: float = 1.0


TargetChoice = int | str | Direction | Contrast


@dataclass(frozen=True)
class Targets:
    """The targets' nodes and read vectors."""

    nodes: tuple[TargetNode, ...]
    vectors: Float32[Tensor, "target d_model"]


def choose_targets(
    linear: LinearHost,
    choices: Sequence[TargetChoice] | None,
    options: AttributionOptions,
    position: int,
    tokens_of: Callable[[str], list[int]],
    text_of: Callable[[int], str],
) -> Targets:
    """The targets asked for, or the most probable tokens.

    Raises:
        GraphError: a target is no single token, or not of this vocabulary.
    """
    probability = linear.logits[0].float().softmax(0)
    unembedding = linear.unembedding
    mean = unembedding.float().mean(0)

    def token(choice: int | str) -> int:
        ids = [choice] if isinstance(choice, int) else tokens_of(choice)
        if len(ids) != 1 or not 0 <= ids[0] < len(unembedding):
            raise GraphError(
                f"The target {choice!r} is {len(ids)} tokens ({ids}); a target is one of {len(unembedding):,} tokens. "
                "Mind the space in front (' Paris'), or give a token id."
            )
        return ids[0]

    def build(choice: TargetChoice, number: int) -> tuple[TargetNode, Tensor]:
        if isinstance(choice, Direction):
            return TargetNode(choice.text, len(unembedding) + number, choice.weight, position), choice.vector.float()
        if isinstance(choice, Contrast):
            first, second = token(choice.token), token(choice.minus)
            text = f"{text_of(first)} - {text_of(second)}"
            vector = unembedding[first].float() - unembedding[second].float()
            return TargetNode(text, len(unembedding) + number, choice.weight, position), vector
        found = token(choice)
        node = TargetNode(text_of(found), found, float(probability[found]), position)
        return node, unembedding[found].float() - mean

    chosen = likely_tokens(probability, options) if choices is None else choices
    if not chosen:
        raise GraphError("There is no target. Name at least one token, contrast or direction, or leave targets out.")
    built = [build(choice, number) for number, choice in enumerate(chosen)]
    vectors = torch.stack([vector.to(unembedding.device) for _, vector in built])
    return Targets(tuple(node for node, _ in built), vectors)


def likely_tokens(probability: Float[Tensor, " vocabulary"], options: AttributionOptions) -> list[int]:
    """The fewest most probable tokens that hold `desired_logit_prob`, at most `max_n_logits`."""
    top = probability.topk(min(options.max_n_logits, len(probability)))
    needed = int(torch.searchsorted(top.values.cumsum(0), options.desired_logit_prob)) + 1
    return top.indices[:needed].tolist()
