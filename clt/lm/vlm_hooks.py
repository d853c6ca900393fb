"""Hooks under the names of vlm-clt-training: the MLPs as a dictionary, and what passes them in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from clt.lm.hooks import Site
from clt.lm.structure import find_templates, hookpoints_of, sites_of


def get_vlm_hookpoints(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder's MLPs by module path, first layer first; the vision tower's are left out.

    Raises:
        HostModelError: the structure shows no MLPs.
    """
    points = hookpoints_of(model, *find_templates(model))
    pairs = sites_of(model, points)
    return {point.output_path.rpartition(".")[0]: pair.output.module for point, pair in zip(points, pairs)}


def register_activation_hooks(
    model: nn.Module,
    hookpoints: Mapping[str, nn.Module],
    storage: dict[str, Tensor],
    hook_type: Literal["input", "output"] = "input",
) -> list[RemovableHandle]:
    """Put a copy of what enters (or leaves) each module into `storage`, on the CPU, at every forward pass.

    `ModelAdapter.capturing` does this for inputs and outputs at once and removes its hooks by itself.

    Args:
        model: not needed: the hookpoints are its modules; kept because the seed has it.

    Returns:
        Handles; call `.remove()` on each.
    """

    def keeping(name: str, module: nn.Module) -> RemovableHandle:
        site = Site(f"{name}.{hook_type}", module, hook_type == "input")
        return site.read(lambda value: storage.update({name: value.detach().cpu().clone()}))

    return [keeping(name, module) for name, module in hookpoints.items()]
