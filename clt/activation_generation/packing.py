"""Rows of token ids for the host: texts joined end to end, never decoded and tokenised again."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np


class TextPacker:
    """Joins documents and cuts the stream into rows of `context_size` tokens.

    A document is framed as the tokenizer frames a text (BOS, EOS or both); if it does neither, documents are separated
    by EOS, or by BOS if there is no EOS. The last row of a corpus may be shorter: no token is lost.

    Args:
        tokenizer: the host's, as Hugging Face's are: called with texts, and with `bos_token_id` and `eos_token_id`.
        context_size: tokens per row, BOS included.
        prepend_bos: begin every row with BOS (if the tokenizer has one), as hosts expect at position 0.
    """

    def __init__(self, tokenizer: Any, context_size: int, prepend_bos: bool) -> None:
        self._tokenizer = tokenizer
        self._before, self._after = _frame(tokenizer)
        self._bos = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
        self._row_tokens = context_size - len(self._bos)
        self._rest: list[int] = []

    def add(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The rows that are full after some more documents."""
        if not texts:
            return
        for ids in self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
            self._rest += self._framed(ids)
            while len(self._rest) > self._row_tokens:
                yield self._cut()

    def single(self, text: str) -> list[int]:
        """A row with this text alone, cut at `context_size`."""
        ids = self._tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]
        return [*self._bos, *ids[: self._row_tokens]]

    def flush(self) -> Iterator[list[int]]:
        """The last row, if tokens are left; a lone separator is not worth a row."""
        while self._rest and self._rest != self._after:
            yield self._cut()
        self._rest = []

    def _framed(self, ids: list[int]) -> list[int]:
        # A row that begins with a document already has its BOS from `prepend_bos`.
        before = [] if not self._rest and self._before == self._bos else self._before
        return [*before, *ids, *self._after]

    def _cut(self) -> list[int]:
        if self._bos and self._rest[0] == self._bos[0]:
            self._rest = self._rest[1:]
        row, self._rest = self._rest[: self._row_tokens], self._rest[self._row_tokens :]
        return [*self._bos, *row]


class HeldOutChoice:
    """Which samples are held out: one of every 1 / fraction, at a random place among them.

    Any beginning of the corpus has close to the right share, and the choice depends on nothing but the sample's number.
    """

    def __init__(self, fraction: float, seed: int) -> None:
        self._fraction = fraction
        self._seed = seed

    def __call__(self, number: int) -> bool:
        """Whether sample `number` is held out."""
        if self._fraction == 0:
            return False
        nearest = int(number * self._fraction)
        return any(self._chosen(stratum) == number for stratum in range(max(nearest - 1, 0), nearest + 2))

    def _chosen(self, stratum: int) -> int:
        first, end = math.ceil(stratum / self._fraction), math.ceil((stratum + 1) / self._fraction)
        return int(np.random.default_rng([self._seed, stratum]).integers(first, end))


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    plain = tokenizer(["a"], add_special_tokens=False, verbose=False)["input_ids"][0]
    framed = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0]
    start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    before, after = framed[:start], framed[start + len(plain) :]
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    if not before and not after and separator is not None:
        after = [cast(int, separator)]
    return before, after
