"""The seeds' codec: HDF5 chunks with one pair of arrays per layer.

    chunk_<i>.hdf5 (v1 and servers: .h5)   layer_<l>/inputs, layer_<l>/targets: [rows, d_model]
    chunk_<i>.tokens.safetensors           sample, position, kind of each row (ours only)

bfloat16 is stored as its bit pattern in uint16. Arrays are uncompressed and contiguous unless asked otherwise, so that
they can be memory-mapped like any other file.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Int64, Shaped
from safetensors.numpy import load_file, save_file
from torch import Tensor

from clt.config.base import readable_as_usual
from clt.data.rows import RowFile
from clt.data.statistics import SIDES
from clt.errors import ConfigError, DatasetError

_COMPRESSED_ROWS = 1024
"""Rows per HDF5 chunk of a compressed array: what one random row costs to read."""


def compression_options(name: str) -> dict[str, Any]:
    """Keyword arguments of h5py's `create_dataset`.

    Raises:
        ConfigError: the filter needs a package that is not installed.
    """
    if name in ("gzip", "lzf"):
        return {"compression": name}
    if name == "lz4":
        if importlib.util.find_spec("hdf5plugin") is None:
            raise ConfigError(
                "compression = 'lz4' needs the package hdf5plugin, which is not installed. `pip install hdf5plugin` "
                "or use 'none': lz4 saves nothing on activations (1.00x measured)."
            )
        import hdf5plugin  # pyright: ignore[reportMissingImports]  # optional

        return dict(hdf5plugin.Blosc(cname="lz4"))
    return {}


def tokens_file(chunk: Path) -> Path:
    """Where the kinds, samples and positions of a chunk's rows are."""
    return chunk.with_name(chunk.name.split(".")[0] + ".tokens.safetensors")


def write_chunk(path: Path, rows: RowFile, compression: str) -> None:
    """Turn token-contiguous rows into arrays per layer, a layer at a time."""
    tokens, _, num_layers, d_model = rows.rows.shape
    options = compression_options(compression)
    if options:
        options["chunks"] = (min(tokens, _COMPRESSED_ROWS), d_model)
    with h5py.File(path, "w", libver="latest") as file:
        for layer in range(num_layers):
            for side, name in enumerate(SIDES):
                file.create_dataset(f"layer_{layer}/{name}", data=_as_stored(rows.rows[:, side, layer]), **options)


def write_tokens(path: Path, rows: RowFile) -> None:
    """The file beside a chunk that says what each row is."""
    with readable_as_usual(path):
        save_file({name: np.ascontiguousarray(column) for name, column in rows.columns.items()}, path)


def _as_stored(values: Tensor) -> np.ndarray:
    if values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.uint16).numpy()
    return values.contiguous().numpy()


class Hdf5Chunk:
    """A chunk on disk; contiguous arrays are memory-mapped, others read through HDF5.

    Raises:
        DatasetError: the file is missing, damaged, or not what metadata.json says it is.
    """

    def __init__(self, path: Path, tokens: int, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.tokens = tokens
        self.columns = _read_columns(tokens_file(path), tokens)
        try:
            self._file = h5py.File(path, "r")
        except FileNotFoundError:
            raise DatasetError(f"{path} is missing, but the manifest lists it with {tokens:,} tokens.") from None
        except OSError as error:
            raise DatasetError(
                f"{path} is no readable HDF5 file ({error}). It was probably cut off. Copy it again, or leave it out "
                "with `clt data drop-chunk`."
            ) from None
        self._arrays = [
            self._array(f"layer_{layer}/{name}", metadata) for name in SIDES for layer in range(metadata["num_layers"])
        ]

    def read(
        self, chosen: slice | Int64[np.ndarray, " token"], out: Shaped[Tensor, "token side layer d_model"]
    ) -> None:
        """Copy some rows into `out`."""
        layers = out.shape[2]
        for index, array in enumerate(self._arrays):
            values = torch.from_numpy(_pick(array, chosen))
            out[:, index // layers, index % layers] = values.view(out.dtype)

    def _array(self, name: str, metadata: Mapping[str, Any]) -> Any:
        array = self._file.get(name)
        if not isinstance(array, h5py.Dataset):
            raise DatasetError(
                f"{self.path} lacks {name}, but metadata.json says num_layers = {metadata['num_layers']}."
            )
        shape = (self.tokens, metadata["d_model"])
        if array.shape != shape:
            raise DatasetError(
                f"{self.path}: {name} is {array.shape}, but the manifest and metadata.json say {shape}.\n"
                "The chunk was cut off while being written, or the manifest belongs to another data set."
            )
        found = "bfloat16" if array.dtype in (np.uint16, np.int16) else str(array.dtype)
        if found != metadata.get("dtype", found):
            raise DatasetError(
                f"{self.path}: {name} is stored as {found} (HDF5 type {array.dtype}), but metadata.json says dtype = "
                f"{metadata['dtype']!r}. metadata.json was edited or belongs to another data set."
            )
        offset = array.id.get_offset()
        if offset is None or array.chunks is not None:
            return array
        return np.memmap(self.path, dtype=array.dtype, mode="c", offset=offset, shape=array.shape)


def _pick(array: Any, chosen: slice | Int64[np.ndarray, " token"]) -> np.ndarray:
    if isinstance(chosen, slice) or isinstance(array, np.ndarray):
        return np.asarray(array[chosen])
    # HDF5 takes ascending rows without repetition, and is slow at scattered ones: read the span they lie in.
    first, last = int(chosen.min()), int(chosen.max())
    if last - first < 64 * len(chosen):
        return array[first : last + 1][chosen - first]
    unique, inverse = np.unique(chosen, return_inverse=True)
    return array[unique][inverse]


def stored_dtype(path: Path) -> str:
    """The type of the numbers in a chunk whose metadata does not say."""
    with h5py.File(path, "r") as file:
        group = file["layer_0"]
        dtype = group["inputs"].dtype  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    return "bfloat16" if dtype in (np.uint16, np.int16) else str(dtype)


def _read_columns(path: Path, tokens: int) -> dict[str, np.ndarray]:
    """Data sets of the seeds do not know what their rows are: text, of sample and position -1."""
    if path.exists():
        columns = load_file(path)
        if all(len(column) == tokens for column in columns.values()):
            return columns
        raise DatasetError(f"{path} does not describe {tokens:,} tokens, as the manifest says. Copy it again.")
    return {
        "sample": np.full(tokens, -1, np.int64),
        "position": np.full(tokens, -1, np.int32),
        "kind": np.zeros(tokens, np.uint8),
    }
