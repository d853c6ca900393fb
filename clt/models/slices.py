"""A checkpoint in several files, each with some of the features; together one transcoder, whatever their number.

slices.json          for every tensor its type, shape, the axis that is cut, and which file has which rows of it
part_0000_of_0004.safetensors    tensors named clt/<parameter> and trainer/<state>, as far as this part has them

A checkpoint in one piece (clt.safetensors, trainer.safetensors) is read by the same calls: it has one slice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clt import __version__
from clt.config.base import write_text_atomically
from clt.errors import CheckpointError
from clt.models.checkpoint import CONFIG, WEIGHTS, save_tensors
from clt.types import SAFETENSORS_DTYPES, SAFETENSORS_NAMES

INDEX = "slices.json"
TRAINER = "trainer.safetensors"
STATE = "trainer.json"
WHOLE_FILES = {"clt/": WEIGHTS, "trainer/": TRAINER}
# The axis along which a parameter's features lie; what is not here is not cut.
_AXES = {
    **dict.fromkeys(("W_enc", "b_enc", "log_threshold", "W_dec", "U_dec"), 0),
    **dict.fromkeys(("feature_offset", "feature_scale"), -1),
}


def feature_axis(name: str) -> int | None:
    """The axis of a parameter along which its features lie (-1: the last); None: it is of all features together."""
    return _AXES.get(name.split(".")[0])


def part_of(n_rows: int, part: int, n_parts: int) -> range:
    """The rows of one of several parts that differ by one row at most."""
    return range(n_rows * part // n_parts, n_rows * (part + 1) // n_parts)


def stored_axis(name: str, dimensions: int) -> int | None:
    """The same for a tensor of a checkpoint: `clt/W_enc.0`, `trainer/optimizer/W_enc.0/exp_avg`, ..."""
    if name == "trainer/dead/silent_for":
        return 1
    parts = name.split("/")
    is_state = parts[0] == "trainer" and parts[1] not in ("optimizer", "average")
    parameter = parts[2] if parts[0] == "trainer" and len(parts) > 2 else parts[1]
    axis = feature_axis(parameter)
    if is_state or axis is None or dimensions == 0 or ":" in name:
        return None
    return axis % dimensions


@dataclass(frozen=True)
class Piece:
    """Where some rows of a tensor are."""

    file: str
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class Sliced:
    """One tensor of the checkpoint, in the order of its rows."""

    dtype: str
    shape: tuple[int, ...]
    axis: int | None
    pieces: tuple[Piece, ...]


class Slices:
    """The tensors of a checkpoint, read a slice at a time."""

    def __init__(self, folder: Path, tensors: Mapping[str, Sliced]) -> None:
        """Look at a folder through its index."""
        self.folder, self.tensors = folder, dict(tensors)

    @staticmethod
    def is_sliced(folder: Path) -> bool:
        """Whether a folder holds a checkpoint in several files."""
        return (folder / INDEX).is_file()

    @classmethod
    def open(cls, folder: Path) -> Slices:
        """A checkpoint in several files, or in one piece.

        Raises:
            CheckpointError: there is none, or rows are missing.
        """
        tensors = _read_index(folder) if cls.is_sliced(folder) else _look_into(folder)
        for name, tensor in tensors.items():
            _require_whole(folder, name, tensor)
        return cls(folder, tensors)

    @property
    def n_parts(self) -> int:
        """In how many files it is."""
        return len({piece.file for tensor in self.tensors.values() for piece in tensor.pieces})

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Some rows of a tensor along the axis that is cut; None: all.

        Raises:
            CheckpointError: the tensor or its file is not there.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}. Another version or other options wrote it.")
        tensor = self.tensors[name]
        axis = tensor.axis or 0
        parts = list(self._pieces(tensor, rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def _pieces(self, tensor: Sliced, rows: range | None) -> Iterator[Tensor]:
        for piece in tensor.pieces:
            low, high = 0, piece.stop - piece.start
            if rows is not None:
                low, high = max(low, rows.start - piece.start), min(high, rows.stop - piece.start)
            if rows is None or low < high:
                yield self._piece(piece, tensor.axis, slice(low, high))

    def _piece(self, piece: Piece, axis: int | None, rows: slice) -> Tensor:
        path = self.folder / piece.file
        try:
            with safe_open(path, "pt") as file:
                if axis is None:
                    return file.get_tensor(piece.key)
                return file.get_slice(piece.key)[(slice(None),) * axis + (rows,)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}.\nA part of this checkpoint is missing or cut off. Copy it again, "
                "or go on from an older checkpoint."
            ) from None

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        tensor = self.tensors[name]
        return torch.empty((), dtype=SAFETENSORS_DTYPES[tensor.dtype]).element_size() * torch.Size(tensor.shape).numel()

    def step(self) -> int | None:
        """At which it was taken; None: it is only a transcoder."""
        path = self.folder / STATE
        return json.loads(path.read_text())["step"] if path.is_file() else None

    def named(self, prefix: str) -> list[str]:
        """The tensors whose names begin so."""
        return [name for name in self.tensors if name.startswith(prefix)]


def write_index(folder: Path, tensors: Mapping[str, Sliced]) -> None:
    """Say where every slice is."""
    text = json.dumps({"crosslayer": __version__, "tensors": {name: asdict(each) for name, each in tensors.items()}})
    write_text_atomically(folder / INDEX, text + "\n")


def _read_index(folder: Path) -> dict[str, Sliced]:
    try:
        entries = json.loads((folder / INDEX).read_text())["tensors"]
        return {
            name: Sliced(e["dtype"], tuple(e["shape"]), e["axis"], tuple(Piece(**piece) for piece in e["pieces"]))
            for name, e in entries.items()
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({error!r}). Go on from an older checkpoint.") from None


def _look_into(folder: Path) -> dict[str, Sliced]:
    """The index that a checkpoint in one piece would have."""
    tensors = {}
    for prefix, file in WHOLE_FILES.items():
        path = folder / file
        if not path.is_file():
            continue
        try:
            with safe_open(path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # no dictionary
                    part = opened.get_slice(key)
                    shape, axis = tuple(part.get_shape()), stored_axis(prefix + key, len(part.get_shape()))
                    piece = Piece(file, key, 0, 1 if axis is None else shape[axis])
                    tensors[prefix + key] = Sliced(part.get_dtype(), shape, axis, (piece,))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no whole safetensors file: {error}. It was probably cut off.") from None
    if not tensors:
        raise CheckpointError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}. Is it a checkpoint or a result of `clt train`?"
        )
    return tensors


def _require_whole(folder: Path, name: str, tensor: Sliced) -> None:
    at = 0
    for piece in tensor.pieces:
        if piece.start != at or not (folder / piece.file).is_file():
            raise CheckpointError(
                f"{folder}: rows from {at} on of {name} are missing (of {tensor.shape}); {piece.file} "
                f"{'begins at ' + str(piece.start) if piece.start != at else 'does not exist'}. Were all parts copied?"
            )
        at = piece.stop
    if tensor.axis is not None and at != tensor.shape[tensor.axis]:
        raise CheckpointError(
            f"{folder}: {name} ends at row {at} of {tensor.shape[tensor.axis]}. Were all parts copied?"
        )


def merge(folder: Path, target: Path) -> None:
    """Write a checkpoint in one piece, never holding more than one slice of one tensor.

    Raises:
        CheckpointError: a part is missing, or the disk is full.
    """
    slices = Slices.open(folder)
    target.mkdir(parents=True, exist_ok=True)
    for prefix, file in WHOLE_FILES.items():
        names = slices.named(prefix)
        if names:
            _stream(slices, names, len(prefix), target / file)
    _copy_rest(folder, target)


def split(folder: Path, n_parts: int, target: Path) -> None:
    """Write a checkpoint as so many parts, one part in memory at a time."""
    slices = Slices.open(folder)
    target.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[Piece]] = {name: [] for name in slices.tensors}
    for part in range(n_parts):
        file, tensors = part_name(part, n_parts), {}
        for name, tensor in slices.tensors.items():
            if tensor.axis is None:
                rows = range(1) if part == 0 else range(0)
            else:
                rows = part_of(tensor.shape[tensor.axis], part, n_parts)
            if len(rows):
                tensors[name] = slices.read(name, None if tensor.axis is None else rows)
                index[name].append(Piece(file, name, rows.start, rows.stop))
        save_tensors(tensors, target / file)
    _copy_rest(folder, target)
    entries = slices.tensors.items()
    write_index(target, {name: Sliced(e.dtype, e.shape, e.axis, tuple(index[name])) for name, e in entries})


def part_name(part: int, n_parts: int) -> str:
    """The file of one part."""
    return f"part_{part:04d}_of_{n_parts:04d}.safetensors"


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors calls it."""
    return SAFETENSORS_NAMES[dtype]


def _copy_rest(folder: Path, target: Path) -> None:
    for name in (CONFIG, STATE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _stream(slices: Slices, names: list[str], cut: int, path: Path) -> None:
    """A safetensors file, written front to back: length of the header, header, tensors."""
    header: dict[str, object] = {"__metadata__": {"crosslayer": __version__}}
    end = 0
    for name in names:
        tensor = slices.tensors[name]
        size = slices.size(name)
        header[name[cut:]] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                _write(slices, name, file)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written ({end / 1e6:,.1f} MB): {error}.") from None


def _write(slices: Slices, name: str, file: BinaryIO) -> None:
    tensor = slices.tensors[name]
    rows = [range(piece.start, piece.stop) for piece in tensor.pieces] if tensor.axis == 0 else [None]
    for each in rows:
        file.write(slices.read(name, each).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
