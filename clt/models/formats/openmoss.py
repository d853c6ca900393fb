"""OpenMOSS (Language-Model-SAEs) cross-layer transcoders: `config.json` and `sae_weights.safetensors` (or `.pt`).

    theirs                                           ours
    W_E [layer, d_model, feature], b_E               W_enc.{l} (transposed), b_enc.{l}
    W_D.{t} [t + 1, feature, d_model], b_D.{t}       W_dec.{s}[:, t - s], b_dec[t]
    activation_function.log_jumprelu_threshold       log_threshold.{l}
    dataset_average_activation_norm.{hook}           scale = sqrt(d_model) / average

With `sparsity_include_decoder_norm` the choice is made on h |W_dec| (over all targets of a feature): thresholds are
divided by it here, and topk ranks by it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models.formats.files import TensorFile, read_json, read_pickle, require_finite, stored_as
from clt.models.formats.portable import Named, Portable, no_batch_choice

NAME = "openmoss"
_FAMILIES: dict[str, dict[str, Any]] = {
    "relu": {"activation_fn": "relu"},
    "jumprelu": {"activation_fn": "jumprelu"},
    "topk": {"activation_fn": "topk", "topk_mode": "per_layer"},
    "layertopk": {"activation_fn": "topk", "topk_mode": "global"},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_mode": "per_layer"},
    "batchlayertopk": {"activation_fn": "batchtopk", "batchtopk_mode": "global"},
}


def detect(folder: Path) -> bool:
    """Whether a folder is one of its cross-layer transcoders."""
    file = folder / "config.json"
    return file.exists() and read_json(file).get("sae_type") == "clt"


def read(folder: Path, *, batchtopk_as_topk: bool = False) -> Portable:
    """The transcoder of a folder.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or an option has no counterpart here.
    """
    values = read_json(folder / "config.json")
    weights = _weights(folder)
    config = no_batch_choice(_config(folder, values, weights), NAME, batchtopk_as_topk)
    return Portable(NAME, config, lambda: _tensors(config, values, weights))


def _weights(folder: Path) -> TensorFile:
    path = folder / "sae_weights.safetensors"
    if path.exists():
        return TensorFile(path)
    pickled = sorted(folder.glob("*.pt"))
    if not pickled:
        raise CheckpointError(f"{folder} has no sae_weights.safetensors (a .dcp folder must be consolidated there).")
    loaded = read_pickle(pickled[0])
    return TensorFile.of(loaded.get("sae", loaded), str(pickled[0]))


def _config(folder: Path, values: dict[str, Any], weights: TensorFile) -> CLTConfig:
    family = str(values.get("act_fn", "relu")).lower()
    if family not in _FAMILIES:
        raise CheckpointError(f"{folder}: act_fn = {family!r} is none of {', '.join(_FAMILIES)}.")
    norm = values.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "inference", "none"):
        raise CheckpointError(
            f"{folder}: norm_activation = {norm!r} scales every token or batch by itself, which no weights can hold. "
            "Only dataset-wise (and inference: folded already) can be imported."
        )
    layers, width, features = weights.shape("W_E")
    options = dict(_FAMILIES[family])
    if options["activation_fn"] in ("topk", "batchtopk"):
        options[f"{options['activation_fn']}_k"] = values["top_k"]
    return CLTConfig(
        num_features=features, num_layers=layers, d_model=width, model_name=values.get("model_name"),
        ranking="norm" if values.get("sparsity_include_decoder_norm") else "value",
        normalization_method="rms" if norm == "dataset-wise" else "none",
        clt_dtype=stored_as(weights.tensor("b_E"), weights.rows("W_E", 0)), **options,
    )  # fmt: skip


def _tensors(config: CLTConfig, values: dict[str, Any], weights: TensorFile) -> Named:
    shape = (config.num_features, config.d_model)
    for layer in range(config.num_layers):
        yield f"W_enc.{layer}", weights.rows("W_E", layer, config.d_model, config.num_features).T
        yield f"b_enc.{layer}", weights.rows("b_E", layer, config.num_features)
        decoder = torch.stack([weights.rows(f"W_D.{t}", layer, *shape) for t in config.targets_of(layer)], 1)
        yield f"W_dec.{layer}", decoder
        if config.activation_fn == "jumprelu":
            log = weights.rows("activation_function.log_jumprelu_threshold", layer, config.num_features).float()
            yield f"log_threshold.{layer}", _in_units(require_finite(log, "The thresholds"), decoder, config)
    bias = [weights.tensor(f"b_D.{t}", config.d_model) for t in range(config.num_layers)] if "b_D.0" in weights else []
    yield "b_dec", torch.stack(bias) if bias else torch.zeros(config.num_layers, config.d_model)
    if config.normalization_method == "rms":
        for side, hooks in (("input", values["hook_points_in"]), ("target", values["hook_points_out"])):
            norms = [weights.tensor(f"dataset_average_activation_norm.{hook}").float().reshape(()) for hook in hooks]
            scale = config.d_model**0.5 / require_finite(torch.stack(norms), "dataset_average_activation_norm")
            yield f"{side}_scale", scale[:, None].expand(-1, config.d_model)


def _in_units(log: Tensor, decoder: Tensor, config: CLTConfig) -> Tensor:
    """Thresholds on h |W_dec| as thresholds on h."""
    if config.ranking == "value":
        return log
    return log - torch.linalg.vector_norm(decoder.float().flatten(1), dim=1).clamp_min(1e-12).log()
