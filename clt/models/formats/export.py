"""Transcoders of ours in the files of other projects: the same function, or a refusal that says what to do.

Everything is folded first (standardisation multiplied into the weights, shared decoders written out). What a format
cannot hold is refused, never approximated: decoders are never summed, and a window that a format has no word for is
padded with zeros only where that is the same function, and the size is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from clt import __version__
from clt.config.base import write_text_atomically
from clt.errors import ConfigError
from clt.models.checkpoint import save_tensors, save_transcoder
from clt.models.clt import CrossLayerTranscoder
from clt.models.fold import fold, untie
from clt.models.formats.hooks import Hooks


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to, and what a format wants to know besides the weights."""

    folder: Path
    hooks: Hooks
    """Names of what is read and written."""
    own_layer_only: bool = False
    """For formats that only hold per-layer transcoders: leave out what a feature writes to later layers."""


_SAELENS = "6.0.0"
"""The version whose layout is written: SAELens takes files without one for older and drops their metadata."""

Export = Callable[[CrossLayerTranscoder, Target], list[str]]


@torch.no_grad()
def export(transcoder: CrossLayerTranscoder, format: str, target: Target) -> list[str]:
    """Write a transcoder as another project's; returns what the user should know about it.

    Raises:
        ConfigError: the format cannot hold this transcoder, or a folder with files is in the way.
        CheckpointError: the disk is full.
    """
    if format not in EXPORTS:
        raise ConfigError(f"There is no format {format!r} to write. Formats: {', '.join(EXPORTS)}.")
    if target.folder.exists() and any(target.folder.iterdir()):
        raise ConfigError(f"{target.folder} is not empty. Choose a new folder; nothing is overwritten.")
    return EXPORTS[format](transcoder, target)


def _plain(
    transcoder: CrossLayerTranscoder, format: str, families: tuple[str, ...], *, skip: bool = False
) -> CrossLayerTranscoder:
    """Folded and untied, if the format can hold what remains."""
    config = transcoder.config
    if config.activation_fn not in families:
        raise ConfigError(
            f"{format} cannot hold activation_fn = {config.activation_fn!r}, only {' or '.join(families)}. "
            + (
                "Convert first: clt convert --clt ... --output ..."
                if config.activation_fn in ("topk", "batchtopk")
                else "Choose another format (`clt export --help`)."
            )
        )
    if config.input_norm != "none":
        raise ConfigError(f"{format} has no place for input_norm = {config.input_norm!r}. Only ours has.")
    if config.skip_connection != "none" and not skip:
        raise ConfigError(
            f"{format} has no place for a skip connection. Formats that have: crosslayer-coding, eleuther, ours, and "
            "for per-layer transcoders circuit-tracer and saelens."
        )
    plain = untie(fold(transcoder))
    if plain.config.enable_feature_offset and any(bool(offset.any()) for offset in plain.feature_offset):
        raise ConfigError(
            f"{format} has no place for feature offsets (what a feature adds for being on at all). "
            "Formats that have: eleuther, ours."
        )
    return plain


def _whole_window(transcoder: CrossLayerTranscoder, source: int) -> Tensor:
    """`[feature, target, d_model]` for the targets `source`, `source + 1`, ... to the last layer."""
    config = transcoder.config
    weight = transcoder.decoders.weight(source)
    whole = weight.new_zeros(config.num_features, config.num_layers - source, config.d_model)
    targets = config.targets_of(source)
    whole[:, targets.start - source : targets.stop - source] = weight
    return whole


def _padding_note(transcoder: CrossLayerTranscoder) -> list[str]:
    """How much of what is written is zeros, if any is."""
    config = transcoder.config
    layers = config.num_layers
    whole, used = layers * (layers + 1) // 2, sum(len(config.targets_of(s)) for s in range(layers))
    if used == whole:
        return []
    size = (whole - used) * config.num_features * config.d_model * transcoder.W_dec[0].element_size()
    return [
        f"The format knows no window: {whole - used} of {whole} decoders are zeros, {size / 1e6:,.1f} MB more on disk."
    ]


def _is_per_layer(transcoder: CrossLayerTranscoder) -> bool:
    return transcoder.config.first_target == 0 and transcoder.config.span == 1


def _to_circuit_tracer(transcoder: CrossLayerTranscoder, target: Target) -> list[str]:
    hooks = target.hooks.circuit_tracer()
    per_layer = _is_per_layer(transcoder)
    plain = _plain(transcoder, "circuit-tracer", ("jumprelu", "relu"), skip=per_layer)
    for layer in range(plain.config.num_layers):
        for name, tensors in (_set_layer if per_layer else _clt_layer)(plain, layer):
            save_tensors(tensors, target.folder / name)
    kind = "transcoder_set" if per_layer else "cross_layer_transcoder"
    values = {"model_kind": kind, "scan": str(target.folder.resolve()), **hooks}
    if target.hooks.model_name is not None:
        values["model_name"] = target.hooks.model_name
    write_text_atomically(target.folder / "config.yaml", yaml.safe_dump(values))
    return [] if per_layer else _padding_note(plain)


def _clt_layer(plain: CrossLayerTranscoder, layer: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    encoder = {"W_enc": plain.W_enc[layer], "b_enc": plain.b_enc[layer], "b_dec": plain.b_dec[layer]}
    if plain.config.activation_fn == "jumprelu":
        encoder["threshold"] = plain.threshold(layer)
    yield f"W_enc_{layer}.safetensors", {f"{name}_{layer}": value for name, value in encoder.items()}
    yield f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": _whole_window(plain, layer)}


def _set_layer(plain: CrossLayerTranscoder, layer: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    tensors = _own_layer(plain, layer)
    if "threshold" in tensors:
        tensors["activation_function.threshold"] = tensors.pop("threshold")
    yield f"layer_{layer}.safetensors", tensors


def _own_layer(plain: CrossLayerTranscoder, layer: int) -> dict[str, Tensor]:
    """Encoder `[feature, d_model]` and what is written to the own layer; `W_skip` as other projects have it, x W^T."""
    tensors = {
        "W_enc": plain.W_enc[layer], "b_enc": plain.b_enc[layer], "b_dec": plain.b_dec[layer],
        "W_dec": _whole_window(plain, layer)[:, 0],
    }  # fmt: skip
    if plain.config.activation_fn == "jumprelu":
        tensors["threshold"] = plain.threshold(layer)
    if plain.config.skip_connection != "none":
        tensors["W_skip"] = plain.W_skip[layer][0].T
    return tensors


def _to_saelens(transcoder: CrossLayerTranscoder, target: Target) -> list[str]:
    if not _is_per_layer(transcoder) and not target.own_layer_only:
        raise ConfigError(
            "SAELens holds transcoders of one layer each. A cross-layer transcoder would lose what its features write "
            "to later layers, and their sum is not a decoder of any layer. Export a per-layer transcoder "
            "(n_targets = 1), or pass --own-layer-only for encoders with their own layer's decoder."
        )
    plain = _plain(transcoder, "saelens", ("jumprelu", "relu"), skip=True)
    if plain.config.skip_connection == "all" and not _is_per_layer(transcoder):
        raise ConfigError("Skip connections to later layers have no place in SAELens. Use eleuther or ours.")
    jumps, skips = plain.config.activation_fn == "jumprelu", plain.config.skip_connection != "none"
    architecture = ("jumprelu_" if jumps else "") + ("skip_" if skips else "") + "transcoder"
    for layer in range(plain.config.num_layers):
        tensors = _own_layer(plain, layer)
        tensors["W_enc"] = tensors["W_enc"].T
        folder = target.folder / f"layer_{layer}"
        save_tensors(tensors, folder / "sae_weights.safetensors")
        values = {
            "architecture": architecture, "d_in": plain.config.d_model, "d_sae": plain.config.num_features,
            "d_out": plain.config.d_model, "dtype": plain.config.clt_dtype or "float32", "device": "cpu",
            "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
            "metadata": {
                "model_name": target.hooks.model_name, "exported_by": f"crosslayer {__version__}",
                "sae_lens_version": _SAELENS,
                **target.hooks.saelens(layer), "own_layer_only": not _is_per_layer(transcoder),
            },
        }  # fmt: skip
        write_text_atomically(folder / "cfg.json", json.dumps(values, indent=2) + "\n")
    left_out = "What features write to later layers is left out: fine for encoding, not for reconstruction."
    return [] if _is_per_layer(transcoder) else [left_out]


def _to_crosslayer_coding(transcoder: CrossLayerTranscoder, target: Target) -> list[str]:
    plain = _plain(transcoder, "crosslayer-coding", ("jumprelu", "relu"), skip=True)
    config = plain.config
    values: dict[str, Any] = {
        "num_features": config.num_features, "num_layers": config.num_layers, "d_model": config.d_model,
        "model_name": target.hooks.model_name, "normalization_method": "none", "activation_fn": config.activation_fn,
        "jumprelu_threshold": config.jumprelu_threshold, "clt_dtype": config.clt_dtype,
        "mlp_input_template": config.mlp_input_template, "mlp_output_template": config.mlp_output_template,
        "tl_input_template": None, "tl_output_template": None, "decoder_tying": "none",
        "enable_feature_offset": False, "enable_feature_scale": False,
        "skip_connection": config.skip_connection != "none",
    }  # fmt: skip
    write_text_atomically(target.folder / "cfg.json", json.dumps(values, indent=2) + "\n")
    save_tensors(_crosslayer_coding_tensors(plain), target.folder / "model.safetensors")
    return _padding_note(plain)


def _crosslayer_coding_tensors(plain: CrossLayerTranscoder) -> dict[str, Tensor]:
    """Its second version's names; the bias of a target lies with its own layer's decoder."""
    config, tensors = plain.config, {}
    for source in range(config.num_layers):
        tensors[f"encoder_module.encoders.{source}.weight"] = plain.W_enc[source]
        tensors[f"encoder_module.encoders.{source}.bias_param"] = plain.b_enc[source]
        whole = _whole_window(plain, source)
        for i in range(config.num_layers - source):
            pair = f"decoder_module.decoders.{source}->{source + i}"
            tensors[f"{pair}.weight"] = whole[:, i].T
            tensors[f"{pair}.bias_param"] = plain.b_dec[source] * (i == 0)
        if config.skip_connection != "none":
            skips, window = plain.W_skip[source], config.skip_targets_of(source)
            for layer in range(source, config.num_layers):
                weight = skips[layer - window.start].T if layer in window else skips.new_zeros(skips.shape[1:])
                tensors[f"decoder_module.skip_weights.{source}->{layer}"] = weight
    if config.activation_fn == "jumprelu":
        tensors["theta_manager.log_threshold"] = torch.stack([each.float() for each in plain.log_threshold])
    return tensors


def _to_eleuther(transcoder: CrossLayerTranscoder, target: Target) -> list[str]:
    config = transcoder.config
    if config.activation_fn != "topk" or config.topk_mode != "per_layer":
        raise ConfigError(
            f"EleutherAI's transcoders keep the k largest features of each layer; activation_fn = "
            f"{config.activation_fn!r}"
            + (" over all layers" if config.activation_fn == "topk" else "")
            + " has no place there. Formats for JumpReLU: circuit-tracer, clt-forge, crosslayer-coding, ours."
        )
    plain = untie(fold(transcoder))
    span = config.first_target + config.span
    for source in range(config.num_layers):
        count = min(span, config.num_layers - source)
        name = target.hooks.module(source)
        save_tensors(_eleuther_layer(plain, source, count), target.folder / name / "sae.safetensors")
        values = {
            "activation": "topk", "num_latents": config.num_features, "k": config.topk_count, "d_in": config.d_model,
            "transcode": True, "coalesce_topk": "none", "normalize_io": False, "n_targets": count if span > 1 else 0,
            "n_sources": 0, "skip_connection": config.skip_connection != "none",
            "train_post_encoder": plain.config.enable_feature_offset, "post_encoder_scale": False,
            "dtype": config.clt_dtype or "none",
        }  # fmt: skip
        write_text_atomically(target.folder / name / "cfg.json", json.dumps(values, indent=2) + "\n")
    return []


def _eleuther_layer(plain: CrossLayerTranscoder, source: int, count: int) -> dict[str, Tensor]:
    """The tensors of one hookpoint, which writes to its own layer and the following `count` - 1."""
    tensors = {"encoder.weight": plain.W_enc[source], "encoder.bias": plain.b_enc[source]}
    targets, window = plain.config.targets_of(source), plain.config.skip_targets_of(source)
    whole, offset = _whole_window(plain, source), plain.decoders.post.offset(source)
    nothing = torch.zeros_like(plain.b_enc[source])
    for i in range(count):
        suffix, layer = f"s.{i}" if count > 1 else "", source + i
        tensors[f"W_dec{suffix}"] = whole[:, i]
        tensors[f"b_dec{suffix}"] = plain.b_dec[source] * (i == 0)
        if offset is not None:
            tensors[f"post_enc{suffix}"] = offset[layer - targets.start] if layer in targets else nothing
        if plain.config.skip_connection != "none":
            skips = plain.W_skip[source]
            weight = skips[layer - window.start] if layer in window else skips.new_zeros(skips.shape[1:])
            tensors[f"W_skip{suffix}"] = weight.T
    return tensors


def _to_clt_forge(transcoder: CrossLayerTranscoder, target: Target) -> list[str]:
    plain = _plain(transcoder, "clt-forge", ("jumprelu",))
    config, per_layer = plain.config, _is_per_layer(plain)
    layers = range(config.num_layers)
    pairs = [(s, t) for s in layers for t in (range(s, s + 1) if per_layer else range(s, config.num_layers))]
    decoders = [_whole_window(plain, s)[:, : 1 if per_layer else None].transpose(0, 1) for s in layers]
    tensors = {
        "W_enc": torch.stack([plain.W_enc[s].T for s in layers]),
        "b_enc": torch.stack(list(plain.b_enc)),
        "W_dec": torch.cat(decoders),
        "b_dec": torch.stack([plain.b_dec[t] * (s == t) for s, t in pairs]),
        "log_threshold": torch.stack(list(plain.log_threshold)),
        "feature_count": torch.zeros(config.num_layers, config.num_features, dtype=torch.long),
        "layer_mask": torch.tensor([[float(t == layer) for _, t in pairs] for layer in layers]),
        "estimated_norm_scaling_factor_in": torch.ones(config.num_layers),
        "estimated_norm_scaling_factor_out": torch.ones(config.num_layers),
    }
    values = {
        "d_in": config.d_model, "d_latent": config.num_features, "n_layers": config.num_layers,
        "model_name": target.hooks.model_name, "cross_layer_decoders": not per_layer, "dtype":
        config.clt_dtype or "float32", "jumprelu_bandwidth": config.jumprelu_bandwidth,
        "jumprelu_init_threshold": config.jumprelu_threshold, "normalize_decoder": False, "device": "cpu", "seed": 0,
        "debug": False, "context_size": None, "functional_loss": None, "l0_coefficient": None,
        "dead_feature_window": None, "ddp": False, "fsdp": False, "feature_sharding": False,
    }  # fmt: skip
    write_text_atomically(target.folder / "clt_cfg.json", json.dumps(values, indent=2) + "\n")
    save_tensors(tensors, target.folder / "clt_weights.safetensors")
    place = target.hooks.input
    note = "clt-forge's files do not say where they read: it takes ln2.hook_normalized, "
    note += f"this transcoder reads {place or 'an unnamed place'}."
    notes = [] if place is not None and place.endswith("ln2.hook_normalized") else [note]
    return notes if per_layer else notes + _padding_note(plain)


def _to_ours(transcoder: CrossLayerTranscoder, target: Target) -> list[str]:
    save_transcoder(transcoder, target.folder)
    return []


EXPORTS: dict[str, Export] = {
    "circuit-tracer": _to_circuit_tracer,
    "saelens": _to_saelens,
    "crosslayer-coding": _to_crosslayer_coding,
    "eleuther": _to_eleuther,
    "clt-forge": _to_clt_forge,
    "ours": _to_ours,
}
