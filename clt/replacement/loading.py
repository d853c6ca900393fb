"""Host and transcoder from wherever they lie."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clt.activation_generation.corpus import open_model
from clt.config import CLTConfig
from clt.errors import ConfigError, HostModelError
from clt.lm import ModelAdapter
from clt.lm.hook_names import NORMALISED, PREFIX, norm_scale, resolved_template
from clt.models import BaseTranscoder, CrossLayerTranscoder
from clt.models.formats import build, detect, kokosdev
from clt.training.loading import load_model

_SCALED = f"{PREFIX}mlp.hook_in"


def open_host(
    model: str | Path | ModelAdapter, config: CLTConfig | None, options: dict[str, Any] | None = None
) -> ModelAdapter:
    """A host, hooked where the transcoder was trained if its configuration says where.

    Args:
        options: as `ModelAdapter.from_pretrained`.
    """
    if isinstance(model, ModelAdapter):
        if options:
            raise ConfigError(f"{', '.join(options)} cannot be given with a host that is open already.")
        return model
    templates = {} if config is None else templates_of(config)
    try:
        return open_model(str(model), **{**templates, **(options or {})})
    except HostModelError as error:
        if not templates:
            raise
        raise HostModelError(
            f"{model} cannot be opened for this transcoder, which was trained on "
            f"{(config and config.model_name) or 'another host'} at {' and '.join(templates.values())}: {error}"
        ) from error


def open_pair(
    model: str | Path | ModelAdapter, transcoder: str | Path | BaseTranscoder, options: dict[str, Any]
) -> tuple[ModelAdapter, BaseTranscoder]:
    """Host and transcoder, which for some files say about each other what they need.

    A transcoder that reads before the learned scale of the MLP's norm (`ln2.hook_normalized`) gets that scale into its
    own and then reads what the MLP reads.

    Raises:
        HostModelError, CheckpointError: what cannot be opened, and why.
    """
    adapter, loaded = _open(model, transcoder, options)
    if loaded.config.mlp_input_template == PREFIX + NORMALISED:
        return adapter, _read_after_scale(loaded, adapter)
    return adapter, loaded


def _open(
    model: str | Path | ModelAdapter, transcoder: str | Path | BaseTranscoder, options: dict[str, Any]
) -> tuple[ModelAdapter, BaseTranscoder]:
    if isinstance(transcoder, BaseTranscoder):
        return open_host(model, transcoder.config, options), transcoder
    folder = Path(transcoder)
    if folder.is_dir() and kokosdev.detect(folder):
        # vlm-clt-training's files know neither how many layers the host has nor where they were read.
        adapter = open_host(model, None, options)
        return adapter, build(kokosdev.read(folder, host_layers=adapter.n_layers))
    ours_or_theirs = folder.is_file() or (folder.is_dir() and detect(folder) is None)
    loaded = load_model(folder) if ours_or_theirs else CrossLayerTranscoder.from_pretrained(transcoder, "cpu")
    return open_host(model, loaded.config, options), loaded


def _read_after_scale(transcoder: BaseTranscoder, adapter: ModelAdapter) -> BaseTranscoder:
    """The same transcoder, reading x * scale + bias where it read x; the one that was given stays as it is."""
    config = transcoder.config
    if config.input_norm != "none" or not isinstance(transcoder, CrossLayerTranscoder):
        raise ConfigError(f"A transcoder with input_norm = {config.input_norm!r} cannot read at {NORMALISED}.")
    scaled = replace(config, mlp_input_template=_SCALED)
    check_fit(adapter, scaled)
    scales = [norm_scale(adapter.model, layer) for layer in range(config.num_layers)]
    like = transcoder.input_scale  # a host's layers may lie on several devices
    scale, bias = (torch.stack([one.to(like) for one in each]) for each in zip(*scales, strict=True))
    folded = copy.copy(transcoder)
    folded._buffers = dict(transcoder._buffers)
    folded.input_shift = bias + scale * transcoder.input_shift
    folded.input_scale = transcoder.input_scale / scale
    folded.config = scaled
    return folded


def check_same_device(adapter: ModelAdapter, transcoder: CrossLayerTranscoder) -> None:
    """Refuse a pair on different devices, for work that puts products of both together."""
    where = transcoder.input_scale.device
    if where.type != adapter.device.type:
        raise ConfigError(
            f"The host {adapter.name} is on {adapter.device}, the transcoder on {where}. Move it there before: "
            f"transcoder.to({str(adapter.device)!r})."
        )


def templates_of(config: CLTConfig) -> dict[str, str]:
    """The hookpoints a transcoder was trained on, as arguments of `ModelAdapter`."""
    place = _SCALED if config.mlp_input_template == PREFIX + NORMALISED else config.mlp_input_template
    known = {"input_template": place, "output_template": config.mlp_output_template}
    return {name: template for name, template in known.items() if template is not None}


def check_fit(adapter: ModelAdapter, config: CLTConfig) -> None:
    """Refuse a transcoder of another host, or one whose layers cannot be computed one after the other."""
    for name, ours, theirs in (
        ("layers", adapter.n_layers, config.num_layers),
        ("d_model", adapter.d_model, config.d_model),
    ):
        if ours != theirs:
            raise HostModelError(
                f"The host {adapter.name} has {name} = {ours}, the transcoder {theirs}. It was trained on "
                f"{config.model_name or 'another host'}; open that one, or train a transcoder on this one."
            )
    for side, ours, theirs in (
        ("input", adapter.input_template, config.mlp_input_template),
        ("output", adapter.output_template, config.mlp_output_template),
    ):
        if theirs is not None and resolved_template(adapter.model, theirs, side) != ours:
            raise HostModelError(
                f"The transcoder was trained on {theirs}, but the host's MLP {side} is taken at {ours}. Open the host "
                f"with {side}_template={theirs!r}."
            )
    if config.activation_fn == "topk" and config.topk_mode == "global":
        raise ConfigError(
            "A transcoder with topk_mode = 'global' chooses a layer's features by looking at later layers, which in a "
            "replacement model do not exist yet. Convert it to JumpReLU first, or train with topk_mode = 'per_layer'."
        )
