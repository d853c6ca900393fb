"""A transcoder on disk: `cfg.json` (what it is) and `clt.safetensors` (its tensors, by parameter name)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clt import __version__
from clt.config import CLTConfig
from clt.config.base import readable_as_usual
from clt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from clt.models.clt import CrossLayerTranscoder

WEIGHTS = "clt.safetensors"
CONFIG = "cfg.json"


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write all or nothing: a temporary file, flushed to disk, then renamed.

    Raises:
        CheckpointError: the disk is full or not writable; names the folder and what was needed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
        with readable_as_usual(temporary):
            save_file(whole, temporary, {"crosslayer": __version__})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise CheckpointError(
            f"{path} could not be written ({size / 1e6:,.1f} MB): {error}.\n"
            "What was saved before is untouched. Free some space or choose another folder, then run again."
        ) from None


def read_tensors(path: Path, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: the file is missing or cut off.
    """
    if not path.is_file() and (path.parent / "slices.json").is_file():
        raise CheckpointError(
            f"{path.parent} is a checkpoint in several parts. Write it in one piece with `clt checkpoint merge`."
        )
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Is {path.parent} the folder of a trained transcoder?")
    try:
        return load_file(path, device=str(device or "cpu"))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is no whole safetensors file: {error}.\n"
            "It was probably cut off while being copied. Copy it again or use an older checkpoint."
        ) from None


def save_transcoder(transcoder: CrossLayerTranscoder, folder: Path) -> None:
    """Write `cfg.json` and `clt.safetensors`, each in one step, weights last."""
    transcoder.config.to_json(folder / CONFIG)
    save_tensors(dict(transcoder.state_dict()), folder / WEIGHTS)


def load_transcoder(
    cls: type[CrossLayerTranscoder], folder: Path, device: torch.device | str | None
) -> CrossLayerTranscoder:
    """Read what `save_transcoder` wrote, checking every name and shape; or what another project wrote."""
    if not (folder / WEIGHTS).exists() and folder.is_dir():
        from clt.models.formats import build, detect, read

        if detect(folder) is not None:
            return build(read(folder), device)
    try:
        config = CLTConfig.from_json(folder / CONFIG)
    except ConfigError as error:
        raise CheckpointError(f"{folder} is no transcoder: {error}") from None
    tensors = read_tensors(folder / WEIGHTS, device)
    transcoder = cls(config, device=device)
    expected = transcoder.state_dict()
    wrong = [
        f"  {name}: {tuple(tensors[name].shape) if name in tensors else 'missing'} in the file, "
        f"{tuple(expected[name].shape) if name in expected else 'not expected'} by {CONFIG}"
        for name in sorted(expected.keys() | tensors.keys())
        if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit {folder / CONFIG}:\n" + "\n".join(wrong[:8]) + "\n"
            "The two files are probably of different runs."
        )
    require_dtypes(tensors, expected, folder / WEIGHTS)
    transcoder.load_state_dict(tensors)
    return transcoder


def require_dtypes(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: str | os.PathLike[str]
) -> None:
    """Refuse weights of another type than their configuration names; a silent cast would change or bloat them.

    Raises:
        CheckpointError: naming a tensor and both types.
    """
    for name in sorted(tensors.keys() & expected.keys()):
        found, wanted = (str(each[name].dtype).removeprefix("torch.") for each in (tensors, expected))
        if found != wanted:
            raise CheckpointError(
                f"{path}: {name} is {found}, but {CONFIG} (clt_dtype) says {wanted}. They were probably cast after "
                f'training. Set "clt_dtype": "{found}" in {CONFIG}, or cast the weights back.'
            )
