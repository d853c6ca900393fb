"""The training-time non-linearity on all layers: what is on, as codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt.models.activations import jumprelu
from clt.models.codes import Codes, DenseCodes, SparseCodes

if TYPE_CHECKING:
    from clt.models.clt import CrossLayerTranscoder


def activate(model: CrossLayerTranscoder, h: Sequence[Tensor], k_factor: float) -> Sequence[Codes]:
    """The configured one.

    Args:
        model: says which, and with whom it shares a dictionary.
        h: pre-activations of every layer, `[token, feature]`.
        k_factor: how many times the configured k is kept.
    """
    config = model.config
    match config.activation_fn:
        case "relu":
            return [DenseCodes(x.relu()) for x in h]
        case "jumprelu":
            how = config.jumprelu_bandwidth, config.jumprelu_gradient, config.jumprelu_reach
            return [DenseCodes(jumprelu(x, model.threshold(layer).to(x.dtype), *how)) for layer, x in enumerate(h)]
        case "topk":
            return topk(model, h, k_factor)
        case "batchtopk":
            return _batchtopk(model, h, k_factor)


def topk(model: CrossLayerTranscoder, h: Sequence[Tensor], k_factor: float) -> Sequence[Codes]:
    """The best k of each token, per layer or over all layers."""
    k = round(model.peers.whole.topk_count * k_factor)
    scores = [model.scores(layer, x) for layer, x in enumerate(h)]
    if model.config.topk_mode == "per_layer":
        return model.peers.best(h, scores, k)
    every = torch.cat(scores, dim=1)
    cut = model.peers.cut_per_token(every, k).clamp_min(torch.finfo(every.dtype).tiny)
    return [SparseCodes.from_mask(x.relu(), s >= cut) for x, s in zip(h, scores, strict=True)]


def _batchtopk(model: CrossLayerTranscoder, h: Sequence[Tensor], k_factor: float) -> Sequence[Codes]:
    """The best k per token of the whole batch, per layer or over all layers."""
    whole = model.peers.whole
    scores = torch.stack([model.scores(layer, x) for layer, x in enumerate(h)])
    cut = model.peers.cut_of_batch(scores, (whole.batchtopk_k or 0) * k_factor, whole.batchtopk_mode == "global")
    model.remember_threshold(cut)
    return [SparseCodes.from_mask(x.relu(), s >= c) for x, s, c in zip(h, scores, cut, strict=True)]
