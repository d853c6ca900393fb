"""From samples to the tensors a host takes, with a note of what every position is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Integer, UInt8
from torch import Tensor

from clt.errors import HostModelError
from clt.types import TokenKind

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class HostInputs:
    """A batch of prompts, padded, as the host takes them."""

    tensors: Mapping[str, Tensor]
    """Keyword arguments of the host's forward: input_ids, attention_mask, pixel_values, ..."""
    kind: UInt8[Tensor, "row position"]
    """`TokenKind` of each position; padding counts as special."""
    position: Integer[Tensor, "row position"]
    """Place within the row, not counting padding; 0 in the padding."""
    answer: Bool[Tensor, "row position"]
    """Which positions belong to the answer."""
    sample_ids: tuple[str, ...]

    @property
    def input_ids(self) -> Integer[Tensor, "row position"]:
        """Token ids, padding included."""
        return self.tensors["input_ids"]

    @property
    def attention_mask(self) -> Integer[Tensor, "row position"]:
        """1 at tokens, 0 in the padding."""
        return self.tensors["attention_mask"]

    @property
    def is_token(self) -> Bool[Tensor, "row position"]:
        """Everything but the padding."""
        return self.attention_mask.bool()

    @property
    def n_rows(self) -> int:
        """How many samples."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> HostInputs:
        """The same inputs on another device."""
        return HostInputs(
            tensors={name: tensor.to(device) for name, tensor in self.tensors.items()},
            kind=self.kind.to(device),
            position=self.position.to(device),
            answer=self.answer.to(device),
            sample_ids=self.sample_ids,
        )


class TokenIds(NamedTuple):
    """Ids that mean something besides text."""

    image: int | None
    special: tuple[int, ...]
    padding: int


class Row(NamedTuple):
    """One sample's tokens, without padding."""

    per_position: Mapping[str, Tensor]
    """input_ids and whatever else the processor gives per position (`token_type_ids`, ...), each [position]."""
    n_answer: int
    """How many of the last positions belong to the answer."""


def assemble(
    rows: Sequence[Row],
    sample_ids: Sequence[str],
    whole: Mapping[str, Tensor],
    ids: TokenIds,
    side: PaddingSide,
) -> HostInputs:
    """Pad the rows to one length; `whole` are the tensors that are not per position (pixels)."""
    longest = max(len(row.per_position["input_ids"]) for row in rows)
    tensors = dict(whole)
    for name in rows[0].per_position:
        fill = ids.padding if name == "input_ids" else 0
        tensors[name] = torch.stack([_pad(row.per_position[name], longest, fill, side) for row in rows])
    ones = [torch.ones(len(row.per_position["input_ids"]), dtype=torch.long) for row in rows]
    tensors["attention_mask"] = torch.stack([_pad(row, longest, 0, side) for row in ones])
    answers = [_last(len(one), row.n_answer) for one, row in zip(ones, rows)]
    return HostInputs(
        tensors=tensors,
        kind=kinds(tensors["input_ids"], tensors["attention_mask"], ids),
        position=positions(tensors["attention_mask"]),
        answer=torch.stack([_pad(answer, longest, False, side) for answer in answers]),
        sample_ids=tuple(sample_ids),
    )


def from_tokens(
    input_ids: Integer[Tensor, "row position"],
    attention_mask: Integer[Tensor, "row position"] | Bool[Tensor, "row position"] | None,
    ids: TokenIds,
) -> HostInputs:
    """Rows that are tokens already: packed text; `sample_ids` are the row numbers."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    input_ids, attention_mask = input_ids.long(), attention_mask.long()
    return HostInputs(
        tensors={"input_ids": input_ids, "attention_mask": attention_mask},
        kind=kinds(input_ids, attention_mask, ids),
        position=positions(attention_mask),
        answer=torch.zeros_like(input_ids, dtype=torch.bool),
        sample_ids=tuple(str(row) for row in range(len(input_ids))),
    )


def kinds(
    input_ids: Integer[Tensor, "row position"], attention_mask: Integer[Tensor, "row position"], ids: TokenIds
) -> UInt8[Tensor, "row position"]:
    """What each position is made of, by its token id."""
    kind = torch.full_like(input_ids, int(TokenKind.TEXT), dtype=torch.uint8)
    special = torch.tensor(ids.special, dtype=input_ids.dtype, device=input_ids.device)
    kind[torch.isin(input_ids, special) | (attention_mask == 0)] = int(TokenKind.SPECIAL)
    if ids.image is not None:
        kind[(input_ids == ids.image) & (attention_mask != 0)] = int(TokenKind.IMAGE)
    return kind


def positions(attention_mask: Integer[Tensor, "row position"]) -> Integer[Tensor, "row position"]:
    """Place of each token among the tokens of its row; 0 in the padding."""
    return (attention_mask.cumsum(1) - 1).clamp_min(0) * attention_mask


def check_length(inputs: HostInputs, longest: int | None, n_new: int = 0) -> None:
    """Refuse rows that are empty or, with `n_new` generated tokens, longer than the host's positions reach."""
    lengths = inputs.attention_mask.sum(1).tolist()
    for sample_id, length in zip(inputs.sample_ids, lengths):
        if length == 0:
            raise HostModelError(
                f"Sample {sample_id!r} has no tokens: its prompt is empty and the tokenizer adds no BOS. "
                "Give it a prompt."
            )
        # The last generated token is never read.
        if longest is not None and length + max(n_new - 1, 0) > longest:
            fewer = ", or ask for fewer new tokens (--max-new-tokens)" if n_new else ""
            more = f" and may grow by max_new_tokens = {n_new}" if n_new else ""
            raise HostModelError(
                f"Sample {sample_id!r} has {length} positions{more}, but the host takes at most {longest} "
                f"(max_position_embeddings). Shorten the prompt, the answer or the image's token count{fewer}."
            )


def _pad(row: Tensor, length: int, fill: int | bool, side: PaddingSide) -> Tensor:
    padding = row.new_full((length - len(row),), fill)
    return torch.cat([padding, row] if side == "left" else [row, padding])


def _last(length: int, n: int) -> Bool[Tensor, " position"]:
    """True at the last `n` of `length` positions."""
    return torch.arange(length) >= length - n
