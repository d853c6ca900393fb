"""Generation that depends on nothing but the host, the prompt and a seed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from clt.errors import ConfigError
from clt.lm.inputs import HostInputs, TokenIds
from clt.lm.loading import quietly

OnToken = Callable[[Tensor], None]
"""Called with the ids `[row]` chosen at each step, on the CPU; padding for rows that have ended."""
OnText = Callable[[str, str], None]
"""(sample id, the text that its latest tokens add): called as an answer grows."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen."""

    max_new_tokens: int
    """Longest answer."""
    temperature: float = 0.0
    """0: always the most probable token; otherwise logits are divided by it and a token is drawn."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Of the draws. A sample's draws depend on the seed and its id only, not on the batch it is in."""
    use_cache: bool = True
    """Keep keys and values of earlier positions, or compute everything again for each token (same result, slower)."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {self.max_new_tokens} must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature} must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must be above 0 and at most 1.")
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigError(
                f"top_p = {self.top_p} has no effect at temperature 0, which always takes the most probable token. "
                "Give a temperature (such as 1.0), or leave top_p out."
            )


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    inputs: HostInputs,
    decoding: Decoding,
    eos_token_ids: tuple[int, ...],
    ids: TokenIds,
    on_token: OnToken | None = None,
) -> list[Integer[Tensor, " _position"]]:
    """Answers to prompts padded left, on the CPU, each up to and including its first end token."""
    options = GenerationConfig(
        do_sample=False,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=ids.padding,
        use_cache=decoding.use_cache,
        # A generated image placeholder would stand for an image that is not there.
        suppress_tokens=None if ids.image is None else [ids.image],
    )
    extra: dict[str, Any] = {}
    if decoding.temperature > 0:
        extra["logits_processor"] = [_Draw(decoding, inputs.sample_ids)]
    if on_token is not None:
        extra["streamer"] = _Telling(on_token)
    generate: Any = model.generate
    with quietly(), _only(model, options):
        sequences = generate(**inputs.tensors, **extra)
    new = sequences[:, inputs.input_ids.shape[1] :].cpu()
    return [_until_end(row, eos_token_ids) for row in new]


class TextStream:
    """Turns the tokens of a batch into pieces of text, never half a character."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sample_ids: Sequence[str], ends: tuple[int, ...], on_text: OnText
    ) -> None:
        """Nothing said yet.

        Args:
            ends: ids after which a row says no more.
        """
        self._tokenizer, self._sample_ids, self._ends, self._on_text = tokenizer, sample_ids, ends, on_text
        self._ids: list[list[int]] = [[] for _ in sample_ids]
        self._said = ["" for _ in sample_ids]

    def __call__(self, ids: Integer[Tensor, " row"]) -> None:
        """Take one more token per row."""
        for row, token in enumerate(ids.tolist()):
            spoken = self._ids[row]
            if not (spoken and spoken[-1] in self._ends):
                spoken.append(token)
                self._say(row)

    def _say(self, row: int) -> None:
        text = str(self._tokenizer.decode(self._ids[row], skip_special_tokens=True))
        # A replacement character at the end is the first bytes of a character whose others are still to come.
        if len(text) > len(self._said[row]) and not text.endswith("\ufffd"):
            self._on_text(self._sample_ids[row], text[len(self._said[row]) :])
            self._said[row] = text


class _Telling(BaseStreamer):
    """Passes tokens on as they are chosen; the first call brings the prompt."""

    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._met_prompt = False

    def put(self, value: Tensor) -> None:
        if self._met_prompt:
            self._on_token(value)
        self._met_prompt = True

    def end(self) -> None:
        pass


class _Draw(LogitsProcessor):
    """Adds Gumbel noise to the log-probabilities, so that the largest is a draw from them (Gumbel-max trick).

    Every row has its own random numbers, unlike in sampling a batch with one generator.
    """

    def __init__(self, decoding: Decoding, sample_ids: Sequence[str]) -> None:
        self._temperature, self._top_p = decoding.temperature, decoding.top_p
        self._random = [
            torch.Generator().manual_seed(zlib.crc32(f"{decoding.seed} {sample_id}".encode()))
            for sample_id in sample_ids
        ]

    def __call__(
        self, input_ids: Integer[Tensor, "row position"], scores: Float[Tensor, "row vocabulary"]
    ) -> Float[Tensor, "row vocabulary"]:
        logits = kept_by_top_p(scores.double() / self._temperature, self._top_p)
        uniform = torch.stack([torch.rand(logits.shape[1], generator=rng, dtype=torch.float64) for rng in self._random])
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
        return logits.log_softmax(1) + noise.to(logits.device)


def kept_by_top_p(logits: Float[Tensor, "row vocabulary"], top_p: float) -> Float[Tensor, "row vocabulary"]:
    """-inf at all but the most probable tokens that together reach `top_p` (the one that crosses it is kept).

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (nucleus sampling).
    """
    if top_p == 1:
        return logits
    sorted_probability, order = logits.softmax(1).sort(1, descending=True)
    before = sorted_probability.cumsum(1) - sorted_probability
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)


@contextmanager
def _only(model: PreTrainedModel, options: GenerationConfig) -> Iterator[None]:
    """These options and none of the model's own: many ship sampling or a repetition penalty by default."""
    own = model.generation_config
    model.generation_config = options
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(row: Integer[Tensor, " _position"], eos_token_ids: tuple[int, ...]) -> Integer[Tensor, " _position"]:
    """Cut behind the first end token."""
    ends = torch.isin(row, torch.tensor(eos_token_ids, dtype=row.dtype)).nonzero()
    return row[: int(ends[0]) + 1] if len(ends) else row
