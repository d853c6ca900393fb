"""Weights before the first step: the same for every sharding of a dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clt.models.clt import CrossLayerTranscoder

# Spreads (seed, layer, block) over the seeds of the initial weights.
_PRIME = 1_000_003
# Streams of the thin matrices of low-rank decoders, clear of those of encoders (2 layer) and decoders (2 layer + 1).
_THIN = 500_000


@torch.no_grad()
def initialise(model: CrossLayerTranscoder, seed: int) -> None:
    """Encoders U(±1/sqrt(F)), decoders U(±1/sqrt(L d)) (Ameisen et al. 2025), the rest as `decoder_parameters` says.

    Tied decoders start like the others: zero, as in crosslayer-coding, would leave a scale of theirs without gradient.
    """
    config = model.config
    for layer in range(config.num_layers):
        _uniform(model.W_enc[layer], config.num_features**-0.5, seed, 2 * layer)
        _uniform(model.W_dec[layer], (config.num_layers * config.d_model) ** -0.5, seed, 2 * layer + 1)
        if config.decoder_rank is not None:
            _uniform(model.U_dec[layer], config.decoder_rank**-0.5, seed, _THIN + layer)


def _uniform(weight: Tensor, bound: float, seed: int, stream: int, block: int = 256) -> None:
    """Fill with U(±bound), each block of features from its own seed, so that shards of a dictionary agree."""
    if weight.is_meta:  # only its shape is wanted
        return
    for start in range(0, len(weight), block):
        part = weight[start : start + block]
        generator = torch.Generator().manual_seed(((seed * _PRIME + stream) * _PRIME + start) % 2**63)
        values = torch.rand(part.shape, generator=generator) * (2 * bound) - bound
        part.copy_(values)
