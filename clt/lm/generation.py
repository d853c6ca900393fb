"""Greedy generation that depends on nothing but the host and the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from clt.lm.inputs import HostInputs
from clt.lm.loading import quietly


@torch.no_grad()
def generate_greedily(
    model: PreTrainedModel,
    inputs: HostInputs,
    eos_token_ids: tuple[int, ...],
    padding_id: int,
    max_new_tokens: int,
    use_cache: bool,
) -> list[Integer[Tensor, " _position"]]:
    """The most probable token at each step, up to and including the first end token; `inputs` padded left."""
    options = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=padding_id,
        use_cache=use_cache,
    )
    generate: Any = model.generate
    with quietly(), _only(model, options):
        sequences = generate(**inputs.tensors)
    new = sequences[:, inputs.input_ids.shape[1] :].cpu()
    return [_until_end(row, eos_token_ids) for row in new]


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
