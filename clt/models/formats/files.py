"""Reading other people's files: tensor by tensor, nothing unpickled, nothing outside the folder, nothing absurd.

Weights come as safetensors (read lazily), `.pt` (zip of raw storages; `weights_only`, so no code runs) or `.npz`
(`allow_pickle=False`). What a file claims is checked before it is believed.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clt.errors import CheckpointError

# What trained weights never reach: entropy leaves fp32 weights at more than half their size.
_LARGEST_EXPANSION = 100


class TensorFile:
    """The tensors of one file, by name; nothing is read before it is asked for where the file allows that.

    Safetensors are opened anew for each tensor: a tensor's pages stay in memory as long as the mapping it came from.
    """

    def __init__(self, path: Path) -> None:
        """Open.

        Raises:
            CheckpointError: the file is missing, cut off, no tensor file, or would run code or blow up when read.
        """
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist. Was the folder copied completely?")
        self._loaded: Mapping[str, Tensor] | None = None
        if path.suffix == ".safetensors":
            self.names = frozenset(_open_safetensors(path).keys())
        else:
            self._loaded = _read_npz(path) if path.suffix == ".npz" else read_pickle(path)
            self.names = frozenset(self._loaded)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> TensorFile:
        """Tensors that are in memory already, behind the same methods."""
        file = cls.__new__(cls)
        file.path, file._loaded, file.names = Path(name), tensors, frozenset(tensors)
        return file

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """One tensor.

        Args:
            shape: its axes as expected, None for any size; nothing: unchecked.

        Raises:
            CheckpointError: there is no such tensor, or it has another shape.
        """
        self._require(name)
        found = _open_safetensors(self.path).get_tensor(name) if self._loaded is None else self._loaded[name]
        self._check(name, tuple(found.shape), shape)
        return found

    def rows(self, name: str, index: int, *shape: int | None) -> Tensor:
        """Entry `index` along the first axis, the rest of the tensor left on disk."""
        self._require(name)
        if self._loaded is None:
            part = _open_safetensors(self.path).get_slice(name)[index : index + 1][0]
        else:
            part = self._loaded[name][index]
        self._check(f"{name}[{index}]", tuple(part.shape), shape)
        return part

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        self._require(name)
        if self._loaded is None:
            return tuple(_open_safetensors(self.path).get_slice(name).get_shape())
        return tuple(self._loaded[name].shape)

    def _require(self, name: str) -> None:
        if name not in self.names:
            some = ", ".join(sorted(self.names)[:6])
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it has {some}, ... Is it another format?")

    def _check(self, name: str, found: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
        wrong = len(found) != len(expected) or any(e not in (None, f) for f, e in zip(found, expected))
        if expected and wrong:
            shown = tuple("any" if each is None else each for each in expected)
            raise CheckpointError(
                f"{self.path}: {name} has the shape {found}, its configuration asks for {shown}. The files are "
                "probably of different runs, or cut."
            )


def read_pickle(path: Path) -> dict[str, Any]:
    """A `.pt` file of tensors and plain values; anything that would run code is refused.

    Raises:
        CheckpointError: the file is no such file, is cut off, or names a class or function.
    """
    if zipfile.is_zipfile(path):
        _refuse_bombs(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and numbers, which would run code on reading: {str(error).splitlines()[0]}"
            " Not read. Ask for the weights as safetensors."
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole .pt file: {error}. Was it cut off?") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not tensors by name.")
    return loaded


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or no JSON object.
    """
    return _mapping(path, json.loads, json.JSONDecodeError)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain values; tags that name classes are refused.

    Raises:
        CheckpointError: the file is missing, no mapping, or names a class.
    """
    return _mapping(path, yaml.safe_load, yaml.YAMLError)


def inside(folder: Path, name: str) -> Path:
    """A file that another file names, only if it lies inside the folder.

    Raises:
        CheckpointError: it would leave the folder.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder} names the file {name!r}, which lies outside of it. Not read.")
    return path


def require_finite(value: Tensor, what: str) -> Tensor:
    """The same tensor.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise CheckpointError(f"{what} holds {int(bad.sum())} values that are no finite numbers, the first at {place}.")
    return value


def log_of_threshold(theta: Tensor, what: str) -> Tensor:
    """JumpReLU thresholds as logarithms.

    Raises:
        CheckpointError: a threshold is NaN, infinite or negative: a negative one would let negative activations
            through, which no graph tool and no transcoder here does.
    """
    theta = require_finite(theta.float(), what)
    if bool((theta < 0).any()):
        raise CheckpointError(
            f"{what} has {int((theta < 0).sum())} negative thresholds (the lowest is {float(theta.min()):.4g}), which "
            "would let negative activations through. Here thresholds are 0 or more."
        )
    return theta.log()


def stored_as(*weights: Tensor) -> Literal["bfloat16", "float16"] | None:
    """`CLTConfig.clt_dtype` that holds all of these; None is float32, which also double precision becomes."""
    types = {each.dtype for each in weights}
    if types == {torch.bfloat16}:
        return "bfloat16"
    return "float16" if types == {torch.float16} else None


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted as people count: layer_2 before layer_10."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is no whole safetensors file: {error}. Was it cut off?"
        ) from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        _refuse_bombs(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path} is no .npz file of plain arrays: {error}. Not read.") from None


def _refuse_bombs(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        whole = sum(entry.file_size for entry in archive.infolist())
    if whole > _LARGEST_EXPANSION * max(path.stat().st_size, 1):
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) claims to unpack to {whole:,} bytes, more than "
            f"{_LARGEST_EXPANSION} times its size. Weights do not compress like that. Not read."
        )


def _mapping(path: Path, parse: Any, error_type: type[Exception]) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Was the folder copied completely?")
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (error_type, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as plain values: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not names with values.")
    return found
