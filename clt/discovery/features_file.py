"""Feature activations of one sample on disk: `{layer: ...}` as the seeds write it, a tenth of a per cent of the size.

Two forms, both read by `torch.load(path, weights_only=True)`:
    dense    {layer: tensor [position, feature]}, the seeds' own
    packed   {layer: {"entries": uint8, "values": uint8, "shape": int64 [position, feature], "largest": float32}}

Packed, the active (feature, position) pairs of a layer are sorted by feature, then position, and numbered
`feature * n_positions + position`; `entries` holds the gaps between the numbers, seven bits per byte, the high bit
meaning that the number goes on. A value v is the byte 255 + 16 * log2(v / largest), rounded: at most 2.2 % off over
16 octaves. The records inside the file are deflated, which `torch.load` undoes by itself.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Integer, UInt8
from torch import Tensor

from clt.errors import DiscoveryError

STEPS_PER_OCTAVE = 16
LARGEST_ERROR = 2 ** (0.5 / STEPS_PER_OCTAVE) - 1
"""Relative error of a packed value, at most; below 2^-15.9 of the layer's largest a value is read as that."""

_BITS = 7


@dataclass(frozen=True)
class LayerFeatures:
    """The active features of one layer over the positions of one sample, sorted by feature, then position."""

    features: Integer[np.ndarray, " entry"]
    positions: Integer[np.ndarray, " entry"]
    values: Float32[np.ndarray, " entry"]
    n_positions: int
    n_features: int

    def dense(self) -> Float[Tensor, "position feature"]:
        """As a matrix."""
        matrix = torch.zeros(self.n_positions, self.n_features)
        at = (torch.from_numpy(each.astype(np.int64)) for each in (self.positions, self.features))
        matrix[tuple(at)] = torch.from_numpy(self.values)
        return matrix

    @staticmethod
    def from_dense(matrix: Float[Tensor, "position feature"]) -> LayerFeatures:
        """What is above zero in a matrix."""
        features, positions = (each.numpy() for each in (matrix.T > 0).nonzero(as_tuple=True))
        values = matrix[positions, features].float().numpy()
        return LayerFeatures(features, positions, values, *matrix.shape)


def save_features(path: Path, layers: Mapping[int, LayerFeatures], *, dense: bool = False) -> None:
    """Write one sample's file; a reader sees the whole file or none."""
    buffer = io.BytesIO()
    if dense:
        torch.save({layer: each.dense() for layer, each in layers.items()}, buffer)
    else:
        torch.save({layer: _packed(each) for layer, each in layers.items()}, buffer)
        buffer = _deflated(buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def load_features(path: Path, mask: Bool[np.ndarray, " position"] | None = None) -> dict[int, LayerFeatures]:
    """Read a file of either form, ours or the seeds'.

    Args:
        mask: leave out what is active at other positions; None: keep all.

    Raises:
        DiscoveryError: it is missing, cut off, or holds something else.
    """
    try:
        content = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise DiscoveryError(
            f"{path} does not exist. Run `clt phase capture` again; it fills in what is missing."
        ) from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise DiscoveryError(
            f"{path} cannot be read ({str(error).partition(chr(10))[0]}). It was probably cut off; delete it and run "
            "`clt phase capture` again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(layer, int) for layer in content):
        raise DiscoveryError(f"{path} must hold a dictionary from layer numbers to activations.")
    return {layer: _layer(path, each, mask) for layer, each in content.items()}


def _layer(path: Path, content: Any, mask: Bool[np.ndarray, " position"] | None) -> LayerFeatures:
    if isinstance(content, dict) and {"entries", "values", "shape", "largest"} <= set(content):
        _check_length(path, int(content["shape"][0]), mask)
        return _unpacked(content, mask)
    if isinstance(content, Tensor) and content.dim() in (2, 3):
        # The seeds keep the batch axis of one.
        matrix = content.reshape(-1, content.shape[-1])
        _check_length(path, len(matrix), mask)
        return LayerFeatures.from_dense(matrix if mask is None else matrix * torch.from_numpy(mask)[:, None])
    raise DiscoveryError(f"{path}: a layer must be a tensor [position, feature] or packed features.")


def _packed(layer: LayerFeatures) -> dict[str, Tensor]:
    numbers = layer.features * layer.n_positions + layer.positions
    largest = np.float32(layer.values.max(initial=0))
    with np.errstate(divide="ignore"):
        codes = 255 + STEPS_PER_OCTAVE * np.log2(layer.values / (largest or 1))
    return {
        "entries": torch.from_numpy(_varints(np.diff(numbers, prepend=0))),
        "values": torch.from_numpy(np.clip(np.rint(codes), 0, 255).astype(np.uint8)),
        "shape": torch.tensor([layer.n_positions, layer.n_features]),
        "largest": torch.tensor(float(largest)),
    }


def _check_length(path: Path, n_positions: int, mask: Bool[np.ndarray, " position"] | None) -> None:
    if mask is not None and n_positions != len(mask):
        raise DiscoveryError(
            f"{path} holds {n_positions} positions, but its line in model_responses.jsonl says {len(mask)}. The two "
            "are of different runs; delete the file and run `clt phase capture` again."
        )


def _unpacked(content: Mapping[str, Tensor], mask: Bool[np.ndarray, " position"] | None) -> LayerFeatures:
    n_positions, n_features = content["shape"].tolist()
    # Unsigned 32 bits where they suffice: numpy divides them several times faster.
    width = np.uint32 if n_positions * n_features < 1 << 32 else np.uint64
    numbers = np.cumsum(_integers(content["entries"].numpy(), width), dtype=width)
    features = numbers // width(n_positions)
    positions = numbers - features * width(n_positions)
    codes = content["values"].numpy()
    if mask is not None:
        keep = np.flatnonzero(mask[positions])
        features, positions, codes = features[keep], positions[keep], codes[keep]
    octaves = (np.arange(256, dtype=np.float32) - 255) / STEPS_PER_OCTAVE
    values = (content["largest"].numpy() * np.exp2(octaves)).astype(np.float32)[codes]
    return LayerFeatures(features, positions, values, n_positions, n_features)


def _varints(numbers: Int64[np.ndarray, " entry"]) -> UInt8[np.ndarray, " byte"]:
    """Numbers as bytes of seven bits, lowest first; the eighth bit says that more follow."""
    n_bytes = np.ones(len(numbers), dtype=np.int64)
    for place in range(1, 9):
        n_bytes += numbers >= 1 << (_BITS * place)
    starts = np.cumsum(n_bytes) - n_bytes
    out = np.zeros(int(n_bytes.sum()), dtype=np.uint8)
    for place in range(int(n_bytes.max(initial=1))):
        has = n_bytes > place
        goes_on = (n_bytes[has] > place + 1).astype(np.int64) << _BITS
        out[starts[has] + place] = (numbers[has] >> (_BITS * place)) & 127 | goes_on
    return out


def _integers(data: UInt8[np.ndarray, " byte"], width: type[np.unsignedinteger]) -> Integer[np.ndarray, " entry"]:
    """What `_varints` wrote."""
    ends = np.flatnonzero(data < 128)
    if not len(ends):
        return np.zeros(0, dtype=width)
    starts = np.empty_like(ends)
    starts[0], starts[1:] = 0, ends[:-1] + 1
    low = (data & 127).astype(width)
    numbers = low[starts]
    length = ends - starts
    longer = np.flatnonzero(length)
    for place in range(1, int(length.max()) + 1):
        longer = longer[length[longer] >= place]
        numbers[longer] |= low[starts[longer] + place] << width(_BITS * place)
    return numbers


def _deflated(source: io.BytesIO) -> io.BytesIO:
    """The same zip archive with its records compressed."""
    target = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as new:
        for record in _records(old):
            new.writestr(record, old.read(record))
    return target


def _records(archive: zipfile.ZipFile) -> Iterator[str]:
    """Names in the archive's order, which torch relies on."""
    return (entry.filename for entry in archive.infolist())
