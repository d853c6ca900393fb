"""Whether a model can be a host, judged by its configuration on an empty copy without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from clt.lm.adapter import ModelAdapter
from clt.lm.loading import host_config, quietly, sees_images


@dataclass(frozen=True)
class HostSupport:
    """What a host would look like to everything else here."""

    name: str
    model_class: str
    is_multimodal: bool
    n_layers: int
    d_model: int
    parameters: int
    input_template: str
    """Module path of what is read, with {} for the layer."""
    output_template: str
    """Module path of the MLP output."""

    bytes_per_token: int
    """Of activations on disk: inputs and targets of all layers in bf16."""


def inspect_host(name_or_path: str | Path) -> HostSupport:
    """Find the MLPs of a model without loading it.

    Args:
        name_or_path: a folder with config.json, or an id on the Hub.

    Raises:
        HostModelError: no such model, not of a kind that can be a host, or its MLPs are not found by structure.
    """
    name = str(name_or_path)
    with quietly():
        config = host_config(name)
        is_multimodal = sees_images(config)
        loader = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
        with torch.device("meta"):
            model = loader.from_config(config)
    adapter = ModelAdapter(model, name=name)
    return HostSupport(
        name=name,
        model_class=type(model).__name__,
        is_multimodal=is_multimodal,
        n_layers=adapter.n_layers,
        d_model=adapter.d_model,
        parameters=sum(each.numel() for each in model.parameters()),
        input_template=adapter.input_template,
        output_template=adapter.output_template,
        bytes_per_token=2 * 2 * adapter.n_layers * adapter.d_model,
    )
