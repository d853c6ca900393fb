"""TransformerLens's names for places around an MLP, found in a Hugging Face host.

circuit-tracer's transcoders say with these names where they read and write (`hook_resid_mid`, `hook_mlp_out`, ...). A
template `blocks.{}.hook_resid_mid` is accepted wherever a module path is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from clt.errors import HostModelError
from clt.lm.structure import find_templates, normalised_template

PREFIX = "blocks.{}."
# What blocks call the norm between the residual stream and the MLP, those with two norms around the MLP first.
_NORMS_BEFORE = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "post_attention_layernorm",
    "ln_2",
    "final_layer_norm",
)
_NORMS_AFTER = ("post_feedforward_layernorm", "post_mlp_layernorm")
NORMALISED = "ln2.hook_normalized"
NAMES = ("hook_resid_mid", "hook_mlp_out", "mlp.hook_in", "mlp.hook_out")


def resolved_template(model: PreTrainedModel, template: str, side: str) -> str:
    """The module path, with {} for the layer and `.input` or `.output`, that a template means in this host.

    Raises:
        HostModelError: a name of TransformerLens that has no counterpart here.
    """
    if not template.startswith(PREFIX):
        return normalised_template(template, side)
    name = template.removeprefix(PREFIX)
    path = find_templates(model)[0].removesuffix(".input")
    block_path, _, mlp = path.rpartition(".")
    block = model.get_submodule(block_path.format(0))
    match name:
        case "mlp.hook_in":
            return f"{path}.input"
        case "mlp.hook_out":
            return f"{path}.output"
        case "hook_mlp_out":
            after = [child for child in _NORMS_AFTER if child in dict(block.named_children())]
            return f"{block_path}.{after[0]}.output" if after else f"{path}.output"
        case "hook_resid_mid":
            return f"{block_path}.{_norm_before(block, name, mlp)}.input"
    raise HostModelError(
        f"{template!r} names a place that no module of {type(model).__name__} has (known: {', '.join(NAMES)}). Give "
        "module paths with input_template and output_template."
    )


def norm_scale(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
    """Scale and bias, `[d_model]` each, that the norm before a layer's MLP applies to the normalised residual stream.

    TransformerLens' `ln2.hook_normalized` is the norm's output less this bias, divided by this scale. Some norms keep
    the scale as its weight and others as weight + 1 (Gemma): which, is found by calling the norm.

    Raises:
        HostModelError: no norm of a known name, one that does neither, or a scale with a 0 in it.
    """
    path = find_templates(model)[0].removesuffix(".input").format(layer)
    block_path, _, mlp = path.rpartition(".")
    block = model.get_submodule(block_path)
    norm = block.get_submodule(_norm_before(block, NORMALISED, mlp))
    weights = dict(norm.named_parameters())
    if "weight" not in weights:
        one = torch.ones(model.config.get_text_config().hidden_size)
        return one, torch.zeros_like(one)
    weight = weights["weight"].detach()
    bias = weights["bias"].detach() if "bias" in weights else torch.zeros_like(weight)
    zeroed = {name: torch.zeros_like(each) for name, each in weights.items()}
    with torch.no_grad():
        silent = functional_call(norm, zeroed, (torch.ones_like(weight).cumsum(0)[None],)).abs().max() == 0
    scale = weight if silent else weight + 1
    if not bool((scale != 0).all()):
        raise HostModelError(
            f"The norm before layer {layer}'s MLP has the scale 0 in {int((scale == 0).sum())} of "
            f"{len(scale)} dimensions: {NORMALISED} cannot be had from what the MLP reads."
        )
    return scale, bias


def _norm_before(block: nn.Module, name: str, mlp: str) -> str:
    names = [child for child, _ in block.named_children()]
    for norm in _NORMS_BEFORE:
        if norm in names:
            return norm
    raise HostModelError(
        f"{type(block).__name__} has no norm before its {mlp} by a known name (its parts: {', '.join(names)}), so "
        f"{name} cannot be found. Give the module path with input_template."
    )
