"""Goreg12345/crosslayer-transcoder: `config.yaml` and `checkpoint.safetensors`.

    theirs                                      ours
    encoder.W [layer, d_model, feature], .b     W_enc.{l} (transposed), b_enc.{l}
    decoder.W_{t} [t + 1, feature, d_model]     W_dec.{s}[:, t - s]      (per layer: decoder.W [layer, feature, d])
    decoder.b [layer, d_model]                  b_dec
    nonlinearity.theta [1, layer, feature]      log_threshold.{l}        (not a logarithm there)
    nonlinearity.threshold [1] or [layer]       the same: what (batch) top-k keeps at inference is what exceeds it
    input_standardizer.mean | .std, output_...  shift, 1 / scale         (only if not folded)

There `config.yaml` names classes to be imported; here their names are looked up in a list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models.formats.files import TensorFile, log_of_threshold, read_yaml, require_finite, stored_as
from clt.models.formats.portable import Named, Portable

NAME = "crosslayer-transcoder"
_WEIGHTS = "checkpoint.safetensors"
# Class name (without its module) -> what it is here.
_NONLINEARITIES = {
    "JumpReLU": "jumprelu", "ReLU": "relu", "BatchTopK": "jumprelu", "PerLayerBatchTopK": "jumprelu",
}  # fmt: skip


def detect(folder: Path) -> bool:
    """Whether a folder is one of its checkpoints."""
    return (folder / _WEIGHTS).exists() and (folder / "config.yaml").exists()


def read(folder: Path) -> Portable:
    """The transcoder of a folder, folded or not.

    Raises:
        CheckpointError: a class that is not on the list, or a tensor that is missing or of another shape.
    """
    model = read_yaml(folder / "config.yaml").get("model", {})
    weights = TensorFile(folder / _WEIGHTS)
    family = _family(folder, model)
    layers, width, features = weights.shape("encoder.W")
    folded = "input_standardizer.mean" not in weights
    config = CLTConfig(
        num_features=features, num_layers=layers, d_model=width, activation_fn=family,
        n_targets=1 if "decoder.W" in weights else None, normalization_method="none" if folded else "mean_std",
        mlp_input_template="blocks.{}.hook_resid_mid", mlp_output_template="blocks.{}.hook_mlp_out",
        clt_dtype=stored_as(weights.rows("encoder.W", 0)),
    )  # fmt: skip
    return Portable(NAME, config, lambda: _tensors(config, weights), ("It reads the residual stream before ln_2.",))


def _family(folder: Path, model: Any) -> Any:
    """The activation function that the configuration names."""
    options = model.get("init_args", {}) if isinstance(model, dict) else {}
    chosen = options.get("nonlinearity", {}) if isinstance(options, dict) else {}
    path = chosen.get("class_path") if isinstance(chosen, dict) else None
    name = str(path).rsplit(".", 1)[-1]
    if name not in _NONLINEARITIES:
        raise CheckpointError(
            f"{folder / 'config.yaml'} names the non-linearity {path!r}; known are {', '.join(_NONLINEARITIES)}. "
            "Classes named in a file are never imported."
        )
    return _NONLINEARITIES[name]


def _tensors(config: CLTConfig, weights: TensorFile) -> Named:
    shape = (config.num_features, config.d_model)
    bias = "encoder.b" in weights
    for layer in range(config.num_layers):
        yield f"W_enc.{layer}", weights.rows("encoder.W", layer, config.d_model, config.num_features).T
        yield (
            f"b_enc.{layer}",
            (weights.rows("encoder.b", layer, config.num_features) if bias else torch.zeros(config.num_features)),
        )
        if config.n_targets == 1:
            yield f"W_dec.{layer}", weights.rows("decoder.W", layer, *shape)[:, None]
        else:
            pairs = [weights.rows(f"decoder.W_{t}", layer, *shape) for t in config.targets_of(layer)]
            yield f"W_dec.{layer}", torch.stack(pairs, 1)
    if config.activation_fn == "jumprelu":
        logs = log_of_threshold(_thresholds(config, weights), "The thresholds")
        yield from ((f"log_threshold.{layer}", log) for layer, log in enumerate(logs))
    none = torch.zeros(config.num_layers, config.d_model)
    yield "b_dec", weights.tensor("decoder.b", *none.shape) if "decoder.b" in weights else none
    if config.normalization_method == "mean_std":
        for side, theirs in (("input", "input_standardizer"), ("target", "output_standardizer")):
            yield f"{side}_shift", _wide(weights.tensor(f"{theirs}.mean"), none)
            yield f"{side}_scale", 1 / _wide(weights.tensor(f"{theirs}.std"), none)


def _thresholds(config: CLTConfig, weights: TensorFile) -> Tensor:
    """`[layer, feature]`, from one per feature, per layer, or one for all."""
    shape = (config.num_layers, config.num_features)
    if "nonlinearity.theta" in weights:
        return weights.tensor("nonlinearity.theta").reshape(shape)
    return weights.tensor("nonlinearity.threshold").reshape(-1, 1).expand(shape)


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """Per dimension, also where it is stored per layer."""
    value = require_finite(value.float(), "The standardizer")
    return (value[:, None] if value.ndim == 1 else value).expand_as(like)
