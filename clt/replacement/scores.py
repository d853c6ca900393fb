"""What is counted per sample to compare a replacement with its host; sums only, so memory does not grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Integer
from torch import Tensor

from clt.lm import HostInputs
from clt.types import TokenKind

# CT's filtered set: the host is right, but not surely so (Ameisen et al. 2025, evaluation of replacement models).
SURE = 0.8


class Scored(NamedTuple):
    """The positions of a batch after which a text or answer token follows."""

    where: Bool[Tensor, "row position"]
    row: Integer[Tensor, " token"]
    following: Integer[Tensor, " token"]
    """Id of the token that follows."""
    is_answer: Bool[Tensor, " token"]
    """Whether that token belongs to the answer."""


def scored_positions(inputs: HostInputs) -> Scored:
    """Where to compare: every position before a text or answer token; image and special tokens are not predicted."""
    is_next = (inputs.kind == TokenKind.TEXT) | inputs.answer
    where = torch.zeros_like(is_next)
    where[:, :-1] = is_next[:, 1:] & inputs.is_token[:, :-1]
    row, position = where.nonzero(as_tuple=True)
    return Scored(where, row, inputs.input_ids[row, position + 1], inputs.answer[row, position + 1])


def token_scores(
    host: Float[Tensor, "token vocabulary"],
    replacement: Float[Tensor, "token vocabulary"],
    ablated: Float[Tensor, "token vocabulary"],
    following: Integer[Tensor, " token"],
) -> dict[str, Float64[Tensor, " token"]]:
    """Per position: KL, cross entropies in nats, and whether the most probable tokens agree."""
    log_host, log_replacement, log_ablated = (_log_probability(x) for x in (host, replacement, ablated))
    best = log_host.argmax(1)
    agrees = best == log_replacement.argmax(1)
    ce_host = -_at(log_host, following)
    is_filtered = (best == following) & (ce_host.neg().exp() < SURE)
    scores = {
        "n": torch.ones_like(ce_host),
        "kl": (log_host.exp() * (log_host - log_replacement)).sum(1),
        "ce_host": ce_host,
        "ce_replacement": -_at(log_replacement, following),
        "ce_mean_ablated": -_at(log_ablated, following),
        "top1": agrees,
        "n_filtered": is_filtered,
        "top1_filtered": agrees & is_filtered,
    }
    return {name: score.double().cpu() for name, score in scores.items()}


def position_scores(
    host: Float[Tensor, "token vocabulary"], replacement: Float[Tensor, "token vocabulary"]
) -> dict[str, Float64[Tensor, " token"]]:
    """What can be said of any position, whatever follows it: KL, and whether the most probable tokens agree."""
    log_host, log_replacement = _log_probability(host), _log_probability(replacement)
    scores = {
        "n": torch.ones_like(log_host[:, 0]),
        "kl": (log_host.exp() * (log_host - log_replacement)).sum(1),
        "top1": log_host.argmax(1) == log_replacement.argmax(1),
    }
    return {name: score.double().cpu() for name, score in scores.items()}


def answer_scores(
    host: Sequence[Integer[Tensor, " _position"]], replacement: Sequence[Integer[Tensor, " _position"]]
) -> dict[str, Float64[Tensor, " sample"]]:
    """Per sample: how many generated tokens equal the host's at the same index, of the longer of the two answers."""
    equal, length = [], []
    for ours, theirs in zip(host, replacement, strict=True):
        shorter = min(len(ours), len(theirs))
        equal.append(int((ours[:shorter] == theirs[:shorter]).sum()))
        length.append(max(len(ours), len(theirs)))
    matched, longer = torch.tensor(equal).double(), torch.tensor(length).double()
    return {
        "matched": matched,
        "generated": longer,
        "identical": (matched == longer).double(),
        "samples": torch.ones_like(longer),
    }


class PerSample:
    """Sums of scores per sample, over the answer's positions and over all text positions."""

    def __init__(self, n_samples: int) -> None:
        """Start from zero."""
        self._n_samples = n_samples
        self.answer: dict[str, Float64[Tensor, " sample"]] = {}
        self.text: dict[str, Float64[Tensor, " sample"]] = {}
        self.kinds: dict[str, dict[str, Float64[Tensor, " sample"]]] = {}

    def add(self, scores: Mapping[str, Float64[Tensor, " token"]], scored: Scored, first_sample: int) -> None:
        """Add a batch whose first row is sample number `first_sample`."""
        sample, is_answer = scored.row.cpu() + first_sample, scored.is_answer.cpu()
        for name, score in scores.items():
            for sums, part in ((self.answer, score * is_answer), (self.text, score)):
                self._add(sums, name, sample, part)

    def add_by_kind(self, scores: Mapping[str, Float64[Tensor, " token"]], inputs: HostInputs, first: int) -> None:
        """Add scores of all tokens of a batch to the sums of each one's kind."""
        row, position = inputs.is_token.nonzero(as_tuple=True)
        sample, kind = row.cpu() + first, inputs.kind[row, position].cpu()
        for each in TokenKind:
            if (here := kind == each).any():
                sums = self.kinds.setdefault(each.name.lower(), {})
                for name, score in scores.items():
                    self._add(sums, name, sample, score * here)

    def _add(self, sums: dict[str, Tensor], name: str, sample: Tensor, part: Tensor) -> None:
        total = sums.setdefault(name, torch.zeros(self._n_samples, dtype=torch.float64))
        total.index_add_(0, sample, part)


def _log_probability(logits: Float[Tensor, "token vocabulary"]) -> Float[Tensor, "token vocabulary"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def _at(values: Float[Tensor, "token vocabulary"], index: Integer[Tensor, " token"]) -> Float[Tensor, " token"]:
    return values.gather(1, index[:, None]).squeeze(1)
