"""circuit-tracer's transcoder folders, cross-layer and per-layer, as transcoders of ours.

    config.yaml                   model_kind, feature_input_hook, feature_output_hook [, model_name, scan]
    W_enc_{i}.safetensors         W_enc_{i} [F, d], b_enc_{i} [F], b_dec_{i} [d] [, threshold_{i} [F]]
    W_dec_{i}.safetensors         W_dec_{i} [F, L - i, d]: slice k writes into layer i + k
    layer_{i}.safetensors         per-layer sets instead: W_enc, W_dec [F, d], b_enc, b_dec [, W_skip]
                                  [, activation_function.threshold]

A threshold means JumpReLU, none means ReLU. TransformerLens's names of the hookpoints stay as they are
(clt/lm/hook_names.py finds them in the host). Source: circuit-tracer 0.4.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models.checkpoint import read_tensors
from clt.models.clt import CrossLayerTranscoder

CONFIG = "config.yaml"
_KINDS = {"cross_layer_transcoder": "W_enc_*.safetensors", "transcoder_set": "layer_*.safetensors"}


def is_circuit_tracer_folder(folder: Path) -> bool:
    """Whether a folder holds a transcoder as circuit-tracer reads them."""
    return (folder / CONFIG).is_file() and not (folder / "cfg.json").is_file()


def read_circuit_tracer_folder(folder: Path, device: torch.device | str | None = None) -> CrossLayerTranscoder:
    """The transcoder in a folder of circuit-tracer's.

    Raises:
        CheckpointError: not one of the two kinds, files missing, shapes that do not fit, thresholds below 0.
    """
    described = _read_config(folder)
    kind = described.get("model_kind")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{folder / CONFIG} says model_kind = {kind!r}; this version reads {' and '.join(map(repr, _KINDS))}."
        )
    n_layers = len(list(folder.glob(_KINDS[kind])))
    if not n_layers:
        raise CheckpointError(
            f"{folder} has no {_KINDS[kind]}, though its {CONFIG} says {kind}. Copy the whole folder."
        )
    layer = _cross_layer if kind == "cross_layer_transcoder" else _per_layer
    parts = [layer(folder, i, device) for i in range(n_layers)]
    _check_shapes(folder, parts, is_cross_layer=kind == "cross_layer_transcoder")
    transcoder = CrossLayerTranscoder(_config(described, kind, parts), device=device)
    transcoder.load_state_dict(_state(transcoder, parts))
    return transcoder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        described = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CheckpointError(f"{folder / CONFIG} is no YAML: {error}.") from None
    if not isinstance(described, dict):
        raise CheckpointError(f"{folder / CONFIG} holds no keys. It needs model_kind and the two hooks.")
    return described


def _cross_layer(folder: Path, i: int, device: torch.device | str | None) -> dict[str, Tensor]:
    encoder = read_tensors(folder / f"W_enc_{i}.safetensors", device)
    decoder = read_tensors(folder / f"W_dec_{i}.safetensors", device)
    names = {"W_enc": encoder, "b_enc": encoder, "b_dec": encoder, "W_dec": decoder}
    part = {name: _get(tensors, f"{name}_{i}", folder) for name, tensors in names.items()}
    if f"threshold_{i}" in encoder:
        part["threshold"] = encoder[f"threshold_{i}"]
    return part


def _per_layer(folder: Path, i: int, device: torch.device | str | None) -> dict[str, Tensor]:
    tensors = read_tensors(folder / f"layer_{i}.safetensors", device)
    part = {name: _get(tensors, name, folder) for name in ("W_enc", "b_enc", "b_dec", "W_dec")}
    part["W_dec"] = part["W_dec"][:, None]
    if "activation_function.threshold" in tensors:
        part["threshold"] = tensors["activation_function.threshold"]
    if "W_skip" in tensors:
        # There a skip connection is x @ W_skip.T, here x @ W_skip, per target.
        part["W_skip"] = tensors["W_skip"].T[None]
    return part


def _get(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{folder}: there is no tensor {name}, only {', '.join(sorted(tensors))}.")
    return tensors[name]


def _check_shapes(folder: Path, parts: list[dict[str, Tensor]], *, is_cross_layer: bool) -> None:
    features, width = parts[0]["W_enc"].shape
    for i, part in enumerate(parts):
        n_targets = len(parts) - i if is_cross_layer else 1
        expected = {
            "W_enc": (features, width),
            "b_enc": (features,),
            "b_dec": (width,),
            "W_dec": (features, n_targets, width),
            "threshold": (features,),
            "W_skip": (1, width, width),
        }
        for name, tensor in part.items():
            if name == "threshold":
                tensor = part[name] = tensor.expand(features) if tensor.numel() == 1 else tensor
                if bool((tensor < 0).any()):
                    raise CheckpointError(
                        f"{folder}: layer {i} has thresholds below 0, with which features would fire negatively. "
                        "Train it again with positive thresholds."
                    )
            if tensor.shape != expected[name]:
                raise CheckpointError(
                    f"{folder}: {name} of layer {i} is {tuple(tensor.shape)}, but {expected[name]} is needed for "
                    f"{len(parts)} layers, {features} features and d_model = {width}."
                )


def _config(described: dict[str, Any], kind: str, parts: list[dict[str, Tensor]]) -> CLTConfig:
    features, width = parts[0]["W_enc"].shape
    templates = {}
    for side, key in (("input", "feature_input_hook"), ("output", "feature_output_hook")):
        if key in described:
            templates[f"mlp_{side}_template"] = f"blocks.{{}}.{described[key]}"
    return CLTConfig(
        num_features=features,
        num_layers=len(parts),
        d_model=width,
        n_targets=None if kind == "cross_layer_transcoder" else 1,
        activation_fn="jumprelu" if "threshold" in parts[0] else "relu",
        normalization_method="none",
        skip_connection="own" if "W_skip" in parts[0] else "none",
        model_name=described.get("model_name"),
        **templates,
    )


def _state(transcoder: CrossLayerTranscoder, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Our parameters from theirs; scaling and running values stay as they were made."""
    state = dict(transcoder.state_dict())
    for i, part in enumerate(parts):
        state[f"W_enc.{i}"], state[f"b_enc.{i}"], state[f"W_dec.{i}"] = part["W_enc"], part["b_enc"], part["W_dec"]
        if "threshold" in part:
            state[f"log_threshold.{i}"] = part["threshold"].float().log()
        if "W_skip" in part:
            state[f"W_skip.{i}"] = part["W_skip"]
    state["b_dec"] = torch.stack([part["b_dec"] for part in parts])
    return {name: tensor.to(transcoder.state_dict()[name].dtype) for name, tensor in state.items()}
