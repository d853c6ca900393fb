"""Host and transcoder from wherever they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clt.activation_generation.corpus import open_model
from clt.config import CLTConfig
from clt.errors import ConfigError, HostModelError
from clt.lm import ModelAdapter
from clt.models import BaseTranscoder, CrossLayerTranscoder
from clt.models.formats import build, detect, kokosdev
from clt.training.loading import load_model


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

    Raises:
        HostModelError, CheckpointError: what cannot be opened, and why.
    """
    if isinstance(transcoder, BaseTranscoder):
        return open_host(model, transcoder.config, options), transcoder
    folder = Path(transcoder)
    if folder.is_dir() and kokosdev.detect(folder):
        # vlm-clt-training's files know neither how many layers the host has nor where they were read.
        adapter = open_host(model, None, options)
        return adapter, build(kokosdev.read(folder, host_layers=adapter.n_layers))
    ours_or_theirs = folder.is_file() or (folder.is_dir() and detect(folder) is None)
    loaded = load_model(folder) if ours_or_theirs else CrossLayerTranscoder.from_pretrained(transcoder)
    return open_host(model, loaded.config, options), loaded


def templates_of(config: CLTConfig) -> dict[str, str]:
    """The hookpoints a transcoder was trained on, as arguments of `ModelAdapter`."""
    known = {"input_template": config.mlp_input_template, "output_template": config.mlp_output_template}
    return {name: template for name, template in known.items() if template is not None}
