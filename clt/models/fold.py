"""Multiply the standardisation into the weights, so that they work on the host's values as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from clt.models.clt import CrossLayerTranscoder


def fold(transcoder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """The same function of the host's activations with `normalization_method = "none"`.

    Where features are ranked by activation times decoder norm, the norm (in standardised units, which folding
    changes) moves into the encoder first; activations are then in units of their effect and ranked as they are.
    """
    config = transcoder.config
    by_norm = config.activation_fn in ("topk", "batchtopk") and config.ranking == "norm"
    plain = config.replace(normalization_method="none", ranking="value" if by_norm else config.ranking)
    folded = type(transcoder)(plain, device=transcoder.b_dec.device)
    with torch.no_grad():
        for layer in range(config.num_layers):
            unit = transcoder.decoder_norm(layer).clamp_min(1e-12) if by_norm else 1.0
            _fold_layer(transcoder, folded, layer, torch.as_tensor(unit, device=transcoder.b_dec.device))
        folded.b_dec.copy_(transcoder.b_dec / transcoder.target_scale + transcoder.target_shift)
        folded.running_threshold.copy_(transcoder.running_threshold)
        folded.target_variance.copy_(transcoder.target_variance)
    return folded


def _fold_layer(source: CrossLayerTranscoder, folded: CrossLayerTranscoder, layer: int, unit: torch.Tensor) -> None:
    """Encoder, thresholds and decoder of one layer; activations come out `unit` times as large."""
    encoder = source.W_enc[layer] * source.input_scale[layer]
    bias = source.b_enc[layer] - encoder @ source.input_shift[layer].to(encoder.dtype)
    folded.W_enc[layer].copy_(encoder * unit.reshape(-1, 1))
    folded.b_enc[layer].copy_(bias * unit)
    targets = source.config.targets_of(layer)
    scale = source.target_scale[targets.start : targets.stop]
    folded.W_dec[layer].copy_(source.W_dec[layer] / scale / unit.reshape(-1, 1, 1))
    if source.config.activation_fn == "jumprelu":
        folded.log_threshold[layer].copy_(source.log_threshold[layer])
