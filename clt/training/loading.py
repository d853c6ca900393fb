"""A transcoder from wherever its weights and its configuration lie."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models import CrossLayerTranscoder
from clt.models.checkpoint import WEIGHTS, read_tensors, require_dtypes
from clt.models.formats import build, detect, is_crosslayer_coding, read, read_crosslayer_coding

_NAMES = (WEIGHTS, "clt.pt", f"final/{WEIGHTS}", "final/clt.pt")


def load_model(
    weights: Path, config: Path | None = None, device: torch.device | str = "cpu", norm_stats: Path | None = None
) -> CrossLayerTranscoder:
    """Build from a folder (ours, crosslayer-coding's `final/`, or another project's) or from one file of weights.

    Args:
        weights: a folder, a `.safetensors` file, or a `.pt` state dict.
        config: its JSON; None: `cfg.json` beside the weights.
        device: where to build it.
        norm_stats: for crosslayer-coding's weights, the statistics of their data; None: beside the weights, if there.

    Raises:
        CheckpointError: a file is missing or damaged, or the two do not fit.
    """
    if weights.is_dir() and not any((weights / name).exists() for name in _NAMES) and detect(weights) is not None:
        return build(read(weights), device)
    file = _file_of(weights)
    options = CLTConfig.from_json(config or file.parent / "cfg.json")
    tensors = read_tensors(file, device) if file.suffix == ".safetensors" else _read_pickle(file, device)
    if is_crosslayer_coding(tensors):
        beside = file.parent / "norm_stats.json"
        return read_crosslayer_coding(tensors, options, norm_stats or (beside if beside.exists() else None), device)
    model = CrossLayerTranscoder(options, device=device)
    tensors = {name.removeprefix("_orig_mod."): value for name, value in tensors.items()}
    require_dtypes(tensors, model.state_dict(), file)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit {config or file.parent / 'cfg.json'}: {error}") from None
    return model


def _file_of(weights: Path) -> Path:
    if not weights.is_dir():
        return weights
    for name in _NAMES:
        if (weights / name).exists():
            return weights / name
    raise CheckpointError(f"{weights} holds neither {WEIGHTS} nor clt.pt. Is it the folder of a finished run?")


def _read_pickle(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    if not file.exists():
        raise CheckpointError(f"{file} does not exist.")
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} is no whole state dict: {error}. Was it cut off?") from None
