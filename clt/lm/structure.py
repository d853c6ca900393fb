"""Finding a host's MLPs by structure, or by the templates a user gives."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from clt.errors import HostModelError
from clt.lm.hooks import Site, SitePair
from clt.types import Hookpoint

# What a decoder block calls its MLP, or the mixture of experts that stands in its place.
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
# Towers that also consist of blocks with an `.mlp`.
OTHER_TOWERS = ("vision", "visual", "image", "audio")


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The language model's part of the configuration."""
    return model.config.get_text_config(decoder=True)


def find_templates(model: PreTrainedModel) -> tuple[str, str]:
    """Module paths, with {} for the layer, of what the MLPs read and write.

    The decoder's blocks are the one list of `num_hidden_layers` modules that each have an MLP.

    Raises:
        HostModelError: no such list, several, or MLPs whose output is not what they add to the residual.
    """
    n_layers = text_config(model).num_hidden_layers
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not _is_other_tower(name):
            names = [child for child in MLP_NAMES if all(child in dict(block.named_children()) for block in module)]
            if names:
                found[f"{name}.{{}}.{names[0]}"] = module[0].get_submodule(names[0])
    if len(found) != 1:
        what = f"found {' and '.join(found)}" if found else "found none"
        raise HostModelError(
            f"{type(model).__name__}: looked for one list of {n_layers} blocks with a child named "
            f"{', '.join(MLP_NAMES)}; {what}.\n{_TEMPLATES_HELP}\n{module_tree(model)}"
        )
    [(path, mlp)] = found.items()
    if "residual" in inspect.signature(mlp.forward).parameters:
        raise HostModelError(
            f"{type(model).__name__}: {path} adds the residual stream to its own output, so its output is not what "
            f"the MLP writes. Name the last layer inside it.\n{_TEMPLATES_HELP}\n{module_tree(model)}"
        )
    return f"{path}.input", f"{path}.output"


def normalised_template(template: str, side: str) -> str:
    """With an explicit `.input` or `.output`; a bare module path means the given side.

    Raises:
        HostModelError: there is no {} for the layer.
    """
    if "{}" not in template:
        raise HostModelError(f"The template {template!r} needs {{}} where the layer number goes.")
    return template if template.endswith((".input", ".output")) else f"{template}.{side}"


def hookpoints_of(model: PreTrainedModel, input_template: str, output_template: str) -> tuple[Hookpoint, ...]:
    """The two templates filled in for every layer of the decoder."""
    return tuple(
        Hookpoint(layer, input_template.format(layer), output_template.format(layer))
        for layer in range(text_config(model).num_hidden_layers)
    )


def sites_of(model: PreTrainedModel, hookpoints: tuple[Hookpoint, ...]) -> tuple[SitePair, ...]:
    """The modules that the hookpoints name.

    Raises:
        HostModelError: the host has no such module.
    """
    return tuple(SitePair(layer, _site(model, read), _site(model, write)) for layer, read, write in hookpoints)


def _site(model: PreTrainedModel, path: str) -> Site:
    module_path, _, side = path.rpartition(".")
    try:
        module = model.get_submodule(module_path)
    except AttributeError:
        raise HostModelError(
            f"{type(model).__name__} has no module {module_path!r}.\n{_TEMPLATES_HELP}\n{module_tree(model)}"
        ) from None
    return Site(path, module, side == "input")


def down_projection(pair: SitePair, d_model: int) -> Site:
    """The input of the layer that leads from an MLP's neurons back to the residual stream.

    It is the last linear layer of the module whose output is the MLP's, or that module itself.

    Raises:
        HostModelError: there is none, as in a mixture of experts whose matrices are stacked.
    """
    path = pair.output.path.rpartition(".")[0]
    linear = [
        (name, module)
        for name, module in pair.output.module.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and (module.nf if isinstance(module, Conv1D) else module.out_features) == d_model
    ]
    if pair.output.is_input or not linear:
        raise HostModelError(
            f"{path} ({type(pair.output.module).__name__}) has no linear layer with {d_model} outputs, so its neurons "
            "cannot be told apart. Act on features (of a transcoder) instead."
        )
    name, module = linear[-1]
    return Site(".".join(part for part in (path, name, "input") if part), module, True)


def width_of(module: nn.Module) -> int:
    """How many inputs a linear layer has."""
    return module.nx if isinstance(module, Conv1D) else int(module.in_features)  # pyright: ignore[reportArgumentType]


_TEMPLATES_HELP = (
    "Say where to read and write with --mlp-input-template and --mlp-output-template, module paths with {} for the "
    "layer (such as transformer.h.{}.mlp.input). The host's modules:"
)


def module_tree(model: nn.Module, depth: int = 4) -> str:
    """The top of the module tree, lists shown by their first element."""
    lines = [type(model).__name__]
    _grow(model, "  ", depth, lines)
    return "\n".join(lines)


def _grow(module: nn.Module, indent: str, depth: int, lines: list[str]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            lines.append(f"{indent}{name}: {len(child)} x {type(child[0]).__name__}")
            if depth > 1:
                _grow(child[0], indent + "  ", depth - 1, lines)
        else:
            lines.append(f"{indent}{name}: {type(child).__name__}")
            if depth > 1:
                _grow(child, indent + "  ", depth - 1, lines)


def _is_other_tower(name: str) -> bool:
    return any(word in part for part in name.split(".") for word in OTHER_TOWERS)
