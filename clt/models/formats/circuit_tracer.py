"""circuit-tracer's folders, which Neuronpedia and most published CLTs share.

    config.yaml             model_kind: cross_layer_transcoder | transcoder_set; feature_input_hook, feature_output_hook
    W_enc_{i}.safetensors   W_enc_{i} [feature, d_model], b_enc_{i}, b_dec_{i} [d_model], perhaps threshold_{i}
    W_dec_{i}.safetensors   W_dec_{i} [feature, layer - i, d_model]: targets i and on
    layer_{i}.safetensors   for a set: see clt/models/formats/per_layer.py

Features are max(h, 0), or h where it exceeds the threshold if the first file has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clt.config import CLTConfig
from clt.models.formats.files import TensorFile, log_of_threshold, read_yaml, stored_as
from clt.models.formats.per_layer import CircuitTracerSet
from clt.models.formats.portable import Named, Portable

NAME = "circuit-tracer"
CONFIG = "config.yaml"
_KINDS = ("transcoder_set", "cross_layer_transcoder")


def detect(folder: Path) -> bool:
    """Whether a folder is a CLT or a set of transcoders of circuit-tracer."""
    if (folder / "W_enc_0.safetensors").exists() or CircuitTracerSet.files(folder):
        return True
    return (folder / CONFIG).exists() and read_yaml(folder / CONFIG).get("model_kind") in _KINDS


def read(folder: Path) -> Portable:
    """The transcoder of a folder; without `config.yaml`, its hooks are unknown.

    Raises:
        CheckpointError: a file is missing or of another shape, or a set lists files elsewhere.
    """
    values = read_yaml(folder / CONFIG) if (folder / CONFIG).exists() else {}
    hooks: dict[str, Any] = {"model_name": values.get("model_name")}
    for side in ("input", "output"):
        hook = values.get(f"feature_{side}_hook")
        hooks[f"mlp_{side}_template"] = None if hook is None else f"blocks.{{}}.{hook}"
    if not (folder / "W_enc_0.safetensors").exists():
        return CircuitTracerSet.read(folder, values.get("transcoders"), **hooks)
    layers = len(list(folder.glob("W_enc_*.safetensors")))
    first = TensorFile(folder / "W_enc_0.safetensors")
    features, width = first.shape("W_enc_0")
    config = CLTConfig(
        num_features=features, num_layers=layers, d_model=width, normalization_method="none",
        activation_fn="jumprelu" if "threshold_0" in first else "relu",
        clt_dtype=stored_as(*(first.tensor(name) for name in ("W_enc_0", "b_enc_0", "b_dec_0"))), **hooks,
    )  # fmt: skip
    return Portable(NAME, config, lambda: _tensors(folder, config))


def _tensors(folder: Path, config: CLTConfig) -> Named:
    biases, shape = [], (config.num_features, config.d_model)
    for layer in range(config.num_layers):
        file = TensorFile(folder / f"W_enc_{layer}.safetensors")
        yield f"W_enc.{layer}", file.tensor(f"W_enc_{layer}", *shape)
        yield f"b_enc.{layer}", file.tensor(f"b_enc_{layer}", config.num_features)
        if config.activation_fn == "jumprelu":
            theta = file.tensor(f"threshold_{layer}", config.num_features)
            yield f"log_threshold.{layer}", log_of_threshold(theta, f"threshold_{layer}")
        biases.append(file.tensor(f"b_dec_{layer}", config.d_model).clone())
        decoder = TensorFile(folder / f"W_dec_{layer}.safetensors")
        yield f"W_dec.{layer}", decoder.tensor(f"W_dec_{layer}", shape[0], config.num_layers - layer, shape[1])
    yield "b_dec", torch.stack(biases)
