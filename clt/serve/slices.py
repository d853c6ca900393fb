"""Rows of one chunk as crosslayer-coding's clients expect them: layer by layer, inputs then targets, no header."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clt.data.rows import DATA_START
from clt.data.statistics import SIDES
from clt.serve.activation_storage import LAYER_NAME, Refused

_NUMPY = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


def chunk_file(folder: Path, number: int) -> Path:
    """The file of chunk `number`, in any of the formats.

    Raises:
        Refused: 404, there is none.
    """
    for name in (f"chunk_{number}.h5", f"chunk_{number}.hdf5", f"shard_{number:05d}.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise Refused(404, f"There is no chunk {number}.")


def read_slice(path: Path, rows: list[int]) -> bytes:
    """The payload: for layers in numeric order, `inputs[rows]` then `targets[rows]`, rows ascending, stored type.

    Raises:
        Refused: 400, no rows or rows that the chunk does not have.
    """
    if not rows:
        raise Refused(400, "rows is empty.")
    wanted = np.sort(np.array(rows, dtype=np.int64))
    if path.suffix == ".safetensors":
        return _from_rows(path, wanted)
    with h5py.File(path, "r") as file:
        names = sorted((str(key) for key in file if LAYER_NAME.fullmatch(str(key))), key=lambda key: int(key[6:]))
        arrays = [file[f"{name}/{side}"] for name in names for side in SIDES]
        _require_rows(wanted, arrays[0].shape[0])  # pyright: ignore[reportAttributeAccessIssue]
        return b"".join(_pick(array, wanted) for array in arrays)


def _pick(array: Any, wanted: np.ndarray) -> bytes:
    # h5py takes ascending rows without repetition, and is slow at scattered ones: read the span they lie in.
    first, last = int(wanted[0]), int(wanted[-1])
    if last - first < 4 * len(wanted):
        return array[first : last + 1][wanted - first].tobytes()
    unique, inverse = np.unique(wanted, return_inverse=True)
    return array[unique][inverse].tobytes()


def _from_rows(path: Path, wanted: np.ndarray) -> bytes:
    with path.open("rb") as file:
        header = json.loads(file.read(DATA_START)[8:])["activations"]
    if header["dtype"] not in _NUMPY:
        raise Refused(400, f"{path.name} is stored as {header['dtype']}, which only the route /rows can send.")
    dtype, shape = _NUMPY[header["dtype"]], tuple(header["shape"])
    _require_rows(wanted, shape[0])
    stored = np.memmap(path, dtype=dtype, mode="r", offset=DATA_START, shape=shape)
    return np.ascontiguousarray(stored[wanted].transpose(2, 1, 0, 3)).tobytes()


def _require_rows(wanted: np.ndarray, n_rows: int) -> None:
    if wanted[0] < 0 or wanted[-1] >= n_rows:
        raise Refused(
            400, f"Rows {wanted[0]} to {wanted[-1]} were asked for, but the chunk has rows 0 to {n_rows - 1}."
        )
