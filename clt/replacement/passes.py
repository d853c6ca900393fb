"""Where a forward pass is: which positions of its rows it computes, and what those are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from clt.errors import ConfigError, HostModelError
from clt.lm import HostInputs, ModelAdapter
from clt.types import TokenKind

Place = Literal["all", "prompt", "generated", "text", "image", "special", "last"]
Positions = Place | tuple[int, ...]
Part = Literal["image", "prompt", "answer"]
PARTS: tuple[Part, ...] = get_args(Part)
"""A row falls into image positions, the rest of its prompt (padding counts there), and the answer."""

_KINDS = {"text": TokenKind.TEXT, "image": TokenKind.IMAGE, "special": TokenKind.SPECIAL}


class Passes:
    """Counts the positions of a batch through its forward passes: one over all, or token by token with a KV cache.

    Tokens beyond the given inputs are generated ones; what they are is read off their ids as they enter the host.
    """

    def __init__(self, adapter: ModelAdapter, inputs: HostInputs | None, *, cached: bool = True) -> None:
        """Before the first pass.

        Args:
            inputs: the rows, padded on either side; None: unknown, which only positions `all` can do with.
            cached: whether a pass goes on where the one before ended; otherwise each starts at the first position.
        """
        self._adapter, self._inputs, self._cached = adapter, inputs, cached
        self.columns = slice(0, 0)
        self.n_rows = 0 if inputs is None else inputs.n_rows
        self._masks: dict[Positions, Bool[Tensor, "row column"]] = {}
        self._ids: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notice every forward pass of the host while the block runs."""
        with self._adapter.before_each_pass(self.begin):
            yield

    def restart(self) -> None:
        """Forget what has run: the next pass starts at the first position."""
        self.columns = slice(0, 0)

    def begin(self, input_ids: Integer[Tensor, "row column"]) -> None:
        """A pass starts on these tokens."""
        start = self.columns.stop if self._cached else 0
        self.columns = slice(start, start + input_ids.shape[1])
        self.n_rows = input_ids.shape[0]
        self._ids = input_ids
        self._masks.clear()

    def where(self, positions: Positions) -> Bool[Tensor, "row column"]:
        """Which of the current pass's columns a name or a list of places means."""
        if positions not in self._masks:
            self._masks[positions] = self._mask(positions)
        return self._masks[positions]

    def _mask(self, positions: Positions) -> Bool[Tensor, "row column"]:
        assert self._ids is not None
        if self._inputs is None:
            if positions != "all":
                raise ConfigError(
                    f"positions = {positions!r}: which positions those are is not known here. Pass the inputs along: "
                    "active(inputs, interventions=...), logits(inputs, ...) or generate(samples, ...)."
                )
            return torch.ones_like(self._ids, dtype=torch.bool)
        is_token, is_generated, position = self.described()
        match positions:
            case "all":
                return is_token
            case "prompt":
                return is_token & ~is_generated
            case "generated":
                return is_token & is_generated
            case "text" | "image" | "special":
                return is_token & (self.kinds() == _KINDS[positions])
            case "last":
                return is_token & (position == prompt_lengths(self._inputs)[:, None] - 1)
            case _:
                return is_token & _listed(positions, position, prompt_lengths(self._inputs))

    def parts(self) -> Integer[Tensor, "row column"]:
        """Number of the part, in the order of `PARTS`, that each of the current pass's columns is in."""
        answer, image = self.where("generated"), self.where("image")
        return torch.where(answer, 2, torch.where(image, 0, 1))

    def described(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the current columns: whether they are tokens, whether generated, and their place in the row."""
        inputs = self._inputs
        assert inputs is not None
        known, new = self._split()
        ones = torch.ones(inputs.n_rows, new, dtype=torch.bool, device=inputs.answer.device)
        beyond = torch.arange(new, device=ones.device) + max(0, self.columns.start - inputs.input_ids.shape[1])
        lengths = inputs.attention_mask.sum(1)
        return (
            torch.cat([inputs.is_token[:, known], ones], 1),
            torch.cat([inputs.answer[:, known], ones], 1),
            torch.cat([inputs.position[:, known], lengths[:, None] + beyond], 1),
        )

    def kinds(self) -> Tensor:
        """Kind of each position of the rows: the prompt's own, and text or special for what was generated."""
        assert self._inputs is not None
        assert self._ids is not None
        known, new = self._split()
        generated = self._ids[:, self._ids.shape[1] - new :]
        return torch.cat([self._inputs.kind[:, known], self._adapter.kinds_of(generated)], 1)

    def _split(self) -> tuple[slice, int]:
        """The current columns that the inputs have, and how many lie beyond."""
        assert self._inputs is not None
        n_known = self._inputs.input_ids.shape[1]
        known = slice(min(self.columns.start, n_known), min(self.columns.stop, n_known))
        return known, self.columns.stop - max(self.columns.start, n_known) if self.columns.stop > n_known else 0


def prompt_lengths(inputs: HostInputs) -> Integer[Tensor, " row"]:
    """How many positions the prompt of each row has, without padding."""
    return (inputs.is_token & ~inputs.answer).sum(1)


def _listed(positions: tuple[int, ...], position: Tensor, lengths: Tensor) -> Tensor:
    """Whether each position is one of the listed; negative ones count from the end of the prompt."""
    listed = torch.tensor(positions, device=position.device)
    wanted = torch.where(listed < 0, lengths[:, None] + listed, listed)
    return (position[:, :, None] == wanted[:, None]).any(2)


def check_positions(owner: str, positions: object) -> None:
    """Refuse names that mean nothing, and lists that are empty or no whole numbers."""
    names = get_args(Place)
    if isinstance(positions, str) and positions in names:
        return
    if isinstance(positions, tuple) and positions and all(type(place) is int for place in positions):
        return
    raise ConfigError(
        f"{owner}: positions = {positions!r} is none of {', '.join(map(repr, names))}, and no tuple of whole numbers."
    )


def check_reach(owner: str, positions: Positions, inputs: HostInputs, n_new: int = 0) -> None:
    """Refuse places that a row does not have, and image positions where no row has any.

    Args:
        n_new: how many tokens may be generated after the inputs.

    Raises:
        HostModelError: naming the sample and what it has.
    """
    if positions == "image" and not (inputs.kind == TokenKind.IMAGE).any():
        raise HostModelError(
            f"{owner}: positions = 'image', but no sample has image positions. Give an image, or name other positions."
        )
    if isinstance(positions, str):
        return
    rows = zip(inputs.sample_ids, inputs.attention_mask.sum(1).tolist(), prompt_lengths(inputs).tolist())
    for sample_id, length, n_prompt in rows:
        # The last generated token is never read.
        end = length + max(n_new - 1, 0)
        missing = [place for place in positions if not -n_prompt <= place < end]
        if missing:
            raise HostModelError(
                f"{owner}: sample {sample_id!r} has no position {missing[0]}: its prompt has {n_prompt}, and at most "
                f"{end} are read in all (-{n_prompt} to {end - 1})."
            )
