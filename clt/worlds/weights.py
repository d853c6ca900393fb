"""The hosts' weights at both ends: how they start, and how they are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def initialise(model: nn.Module, seed: int, n_layers: Mapping[str, int]) -> None:
    """Weights of standard deviation 1/sqrt(fan in): at this width Hugging Face's 0.02 hardly learns.

    What is added to a residual stream of L layers is divided by sqrt(2 L), so the stream keeps its scale.

    Args:
        model: changed in place.
        seed: the weights are a function of it.
        n_layers: L of each part of the model that has its own stream, by the part's name.
    """
    random = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            scale = 1 / math.sqrt(module.weight[0].numel())
            if name.endswith(("o_proj", "down_proj", "out_proj", "fc2")):
                depth = next(depth for part, depth in n_layers.items() if part in name)
                scale /= math.sqrt(2 * depth)
            module.weight.normal_(0, scale, generator=random)
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.zero_()


@torch.no_grad()
def match_queries_to_keys(layers: Iterable[Any], gain: float = 1.3) -> None:
    """Half of the heads start by looking for tokens like the present one.

    A question's noun then finds the image token of the same meaning from the first step on.
    """
    for layer in layers:
        attention = layer.self_attn
        rows = attention.q_proj.weight.shape[0] // 2
        attention.k_proj.weight[:rows] = gain * attention.q_proj.weight[:rows]


def save_host(model: PreTrainedModel, folder: Path) -> None:
    """Weights as fp16 at rest under a configuration that says fp32, so that loading gives fp32 by default."""
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    halves = {name: tensor.half().contiguous() for name, tensor in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    # safetensors writes files only their owner can read; a wheel is installed for everyone.
    weights.chmod(0o644)
