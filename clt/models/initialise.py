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
    config, first = model.peers.whole, model.peers.first
    for layer in range(config.num_layers):
        _uniform(model.W_enc[layer], config.num_features**-0.5, seed, 2 * layer, first, config.num_features)
        _uniform(
            model.W_dec[layer],
            (config.num_layers * config.d_model) ** -0.5,
            seed,
            2 * layer + 1,
            first,
            config.num_features,
        )
        if config.decoder_rank is not None:
            _uniform(model.U_dec[layer], config.decoder_rank**-0.5, seed, _THIN + layer, first, config.num_features)


def _uniform(weight: Tensor, bound: float, seed: int, stream: int, first: int, total: int, block: int = 256) -> None:
    """Fill with U(±bound), each block of features from its own seed, so that shards of a dictionary agree.

    Args:
        weight: the rows of features `first`, `first + 1`, ... of `total`.
    """
    if weight.is_meta:  # only its shape is wanted
        return
    stop = first + len(weight)
    for start in range(first // block * block, stop, block):
        shape = min(block, total - start), *weight.shape[1:]
        generator = torch.Generator().manual_seed(((seed * _PRIME + stream) * _PRIME + start) % 2**63)
        values = torch.rand(shape, generator=generator) * (2 * bound) - bound
        begin, end = max(start, first), min(start + block, stop)
        weight[begin - first : end - first].copy_(values[begin - start : end - start])
