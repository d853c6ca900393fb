"""The same function with other weights: standardisation multiplied in, shared decoders written out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from clt.config import CLTConfig

if TYPE_CHECKING:
    from clt.models.clt import CrossLayerTranscoder


@torch.no_grad()
def untie(transcoder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """The same function with one decoder per (source, target), into which scales are multiplied.

    Offsets remain, one per (source, target): what a feature adds for being on at all is no part of any matrix.
    """
    config = transcoder.config.replace(
        decoder_tying="none", decoder_rank=None, enable_feature_scale=False, post_encoder="pair"
    )
    untied = _new(transcoder, config)
    tensors = {name: value for name, value in transcoder.state_dict().items() if name in untied.state_dict()}
    for source in range(config.num_layers):
        tensors[f"W_dec.{source}"] = transcoder.decoders.weight(source)
        offset = transcoder.decoders.post.offset(source)
        if offset is not None:
            tensors[f"feature_offset.{source}"] = offset
    untied.load_state_dict(tensors)
    return untied


def _new(transcoder: CrossLayerTranscoder, config: CLTConfig) -> CrossLayerTranscoder:
    """Another transcoder on the same device, each tensor of the type it has in the first."""
    types = {name: tensor.dtype for name, tensor in transcoder.state_dict().items()}
    new = type(transcoder)(config, device=transcoder.b_dec.device)
    for name, tensor in (*new.named_parameters(), *new.named_buffers()):
        tensor.data = tensor.data.to(types[name])
    return new


@torch.no_grad()
def fold(transcoder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """The same function of the host's activations with `normalization_method = "none"`.

    A decoder that targets share cannot hold the scale of each, so shared decoders are written out first (`untie`).
    Where features are ranked by activation times decoder norm, the norm (in standardised units, which folding
    changes) moves into the encoder; activations are then in units of their effect and ranked as they are.
    """
    config = transcoder.config
    by_norm = config.activation_fn in ("topk", "batchtopk") and config.ranking == "norm"
    if config.normalization_method == "none" and not by_norm and not _scales(transcoder):
        return copy.deepcopy(transcoder)
    source = untie(transcoder)
    plain = source.config.replace(normalization_method="none", ranking="value" if by_norm else config.ranking)
    folded = _new(source, plain)
    folded.b_dec.copy_(source.b_dec / source.target_scale + source.target_shift)
    for layer in range(config.num_layers):
        unit = source.decoder_norm(layer).clamp_min(1e-12) if by_norm else torch.ones_like(source.b_enc[layer])
        _fold_layer(source, folded, layer, unit)
        if config.skip_connection != "none":
            _fold_skip(source, folded, layer)
    folded.running_threshold.copy_(source.running_threshold)
    folded.target_variance.copy_(source.target_variance)
    return folded


def _scales(transcoder: CrossLayerTranscoder) -> bool:
    """Whether anything is shifted or scaled: the numbers count, not what the configuration calls them."""
    scales, shifts = ("input_scale", "target_scale"), ("input_shift", "target_shift")
    return any(bool((getattr(transcoder, name) != 1).any()) for name in scales) or any(
        bool(getattr(transcoder, name).any()) for name in shifts
    )


def _fold_layer(source: CrossLayerTranscoder, folded: CrossLayerTranscoder, layer: int, unit: torch.Tensor) -> None:
    """Encoder, thresholds and decoder of one layer; activations come out `unit` times as large."""
    encoder = source.W_enc[layer] * source.input_scale[layer]
    bias = source.b_enc[layer] - encoder @ source.input_shift[layer].to(encoder.dtype)
    folded.W_enc[layer].copy_(encoder * unit.reshape(-1, 1))
    folded.b_enc[layer].copy_(bias * unit)
    targets = source.config.targets_of(layer)
    scale = source.target_scale[targets.start : targets.stop]
    folded.W_dec[layer].copy_(source.W_dec[layer] / scale / unit.reshape(-1, 1, 1))
    if source.config.enable_feature_offset:
        folded.feature_offset[layer].copy_(source.feature_offset[layer] * unit)
    if source.config.activation_fn == "jumprelu":
        folded.log_threshold[layer].copy_(source.log_threshold[layer])


def _fold_skip(source: CrossLayerTranscoder, folded: CrossLayerTranscoder, layer: int) -> None:
    """The skip connection of one layer; what it makes of the inputs' shift goes to the decoder biases."""
    targets = source.config.skip_targets_of(layer)
    window = slice(targets.start, targets.stop)
    weight = source.W_skip[layer] * source.input_scale[layer][:, None] / source.target_scale[window, None]
    folded.W_skip[layer].copy_(weight)
    folded.b_dec[window] -= source.input_shift[layer].to(weight.dtype) @ weight
