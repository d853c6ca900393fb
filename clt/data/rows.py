"""The default codec: token-contiguous rows `[token, side, layer, d_model]` in safetensors shards.

    [8 bytes: header length][JSON header, padded to byte 4096][activations][sample][position][kind]([scale])

Side 0 is what the MLP read, side 1 what it wrote. The rows of one token lie together, so a random token costs one
read, and a memory map of the file is the array itself. Any safetensors reader opens the file. `scale` is there for
int8 only: `[token, side, layer]`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Integer, Shaped
from torch import Tensor

from clt.errors import DatasetError

DATA_START = 4096
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}

Columns = Mapping[str, Shaped[np.ndarray, "token ..."]]
"""What is known of each token beside its activations, by name."""


@dataclass(frozen=True)
class RowLayout:
    """How many bytes a token takes and how they are read."""

    num_layers: int
    d_model: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of one number."""
        return DTYPES[self.dtype]

    @property
    def value_dtype(self) -> torch.dtype:
        """The type of one number once it is read: int8 comes back as bfloat16."""
        return torch.bfloat16 if self.dtype == "int8" else self.torch_dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's activations."""
        return 2 * self.num_layers * self.d_model * self.torch_dtype.itemsize

    @property
    def columns(self) -> dict[str, tuple[str, np.dtype, tuple[int, ...]]]:
        """Name of each column: its safetensors type, its numpy type and its shape per token."""
        columns: dict[str, tuple[str, np.dtype, tuple[int, ...]]] = {
            "sample": ("I64", np.dtype("<i8"), ()),
            "position": ("I32", np.dtype("<i4"), ()),
            "kind": ("U8", np.dtype("u1"), ()),
        }
        if self.dtype == "int8":
            columns["scale"] = ("F32", np.dtype("<f4"), (2, self.num_layers))
        return columns

    def column_bytes(self, name: str) -> int:
        """Bytes of one token in a column."""
        _, dtype, shape = self.columns[name]
        return dtype.itemsize * int(np.prod(shape))

    def file_bytes(self, tokens: int) -> int:
        """Size of a whole shard."""
        return DATA_START + tokens * (self.row_bytes + sum(map(self.column_bytes, self.columns)))

    def header(self, tokens: int) -> dict[str, dict]:
        """The entries of the safetensors header."""
        shape = [tokens, 2, self.num_layers, self.d_model]
        offset = tokens * self.row_bytes
        entries = {
            "activations": {"dtype": _SAFETENSORS_NAMES[self.dtype], "shape": shape, "data_offsets": [0, offset]}
        }
        for name, (dtype, _, shape) in self.columns.items():
            end = offset + tokens * self.column_bytes(name)
            entries[name] = {"dtype": dtype, "shape": [tokens, *shape], "data_offsets": [offset, end]}
            offset = end
        return entries


class RowFileWriter:
    """One shard in the making: rows arrive in order and are put at shuffled places, so memory stays small.

    The place of the i-th row is the i-th number of a permutation of `capacity` drawn from `seed`. If fewer rows come,
    they are moved together at the end, which keeps their shuffled order.
    """

    def __init__(self, path: Path, layout: RowLayout, capacity: int, seed: tuple[int, ...]) -> None:
        self.path = path
        self.layout = layout
        self.capacity = capacity
        self.tokens = 0
        self._places = np.random.default_rng(seed).permutation(capacity)
        self._columns = {
            name: np.zeros((capacity, *shape), dtype) for name, (_, dtype, shape) in layout.columns.items()
        }
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.capacity - self.tokens

    def put(self, rows: Shaped[Tensor, "token side layer d_model"], columns: Columns) -> None:
        """Add rows of the layout's type; at most `room` of them."""
        places = self._places[self.tokens : self.tokens + rows.shape[0]]
        data = memoryview(rows.contiguous().view(torch.uint8).numpy().data).cast("B")
        width = self.layout.row_bytes
        for i, place in enumerate(places.tolist()):
            _write_all(self._file, data[i * width : (i + 1) * width], DATA_START + place * width)
        for name, column in self._columns.items():
            column[places] = columns[name]
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Bring the rows together, write header and columns; the file is then complete under its present name."""
        order = np.sort(self._places[: self.tokens])
        if self.tokens < self.capacity:
            self._close_gaps(order)
        end = DATA_START + self.tokens * self.layout.row_bytes
        tail = b"".join(column[order].tobytes() for column in self._columns.values())
        text = json.dumps(self.layout.header(self.tokens)).encode().ljust(DATA_START - 8)
        _write_all(self._file, memoryview(tail), end)
        _write_all(self._file, memoryview(len(text).to_bytes(8, "little") + text), 0)
        os.ftruncate(self._file, end + len(tail))
        self.close()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _close_gaps(self, order: Integer[np.ndarray, " token"]) -> None:
        # Row i moves from place order[i] >= i to place i, in rising order: nothing unread is overwritten.
        width = self.layout.row_bytes
        for i, place in enumerate(order.tolist()):
            if place != i:
                row = os.pread(self._file, width, DATA_START + place * width)
                _write_all(self._file, memoryview(row), DATA_START + i * width)


class RowFile:
    """A finished shard, memory-mapped.

    Raises:
        DatasetError: the file is missing, cut off, or not what metadata.json says it is.
    """

    def __init__(self, path: Path, layout: RowLayout, tokens: int) -> None:
        if path.exists() and path.stat().st_size >= DATA_START:  # a wrong type should not be taken for a cut file
            self._check_header(path, layout, tokens)
        require_size(path, layout.file_bytes(tokens), tokens)
        self.tokens = tokens
        self._bytes = torch.from_file(str(path), shared=False, size=layout.file_bytes(tokens), dtype=torch.uint8)
        at = DATA_START + tokens * layout.row_bytes
        shape = (tokens, 2, layout.num_layers, layout.d_model)
        self.rows = self._bytes[DATA_START:at].view(layout.torch_dtype).view(shape)
        self.columns: dict[str, np.ndarray] = {}
        for name, (_, dtype, shape) in layout.columns.items():
            end = at + tokens * layout.column_bytes(name)
            self.columns[name] = self._bytes[at:end].numpy().view(dtype).reshape(tokens, *shape)
            at = end

    @staticmethod
    def _check_header(path: Path, layout: RowLayout, tokens: int) -> None:
        with path.open("rb") as file:
            start = file.read(DATA_START)
        try:
            header = json.loads(start[8:])["activations"]
        except (ValueError, KeyError, TypeError):
            raise DatasetError(
                f"{path} does not begin with the header of a shard of rows. It is damaged or another kind of file."
            ) from None
        expected = layout.header(tokens)["activations"]
        for name in ("dtype", "shape"):
            if header.get(name) != expected[name]:
                raise DatasetError(
                    f"{path} holds activations of {name} {header.get(name)}, but metadata.json says "
                    f"{expected[name]}.\nThe file or metadata.json was replaced or edited."
                )


def require_size(path: Path, expected: int, tokens: int) -> None:
    """Refuse a shard that is missing or cut off.

    Raises:
        DatasetError: naming both sizes.
    """
    if not path.exists():
        raise DatasetError(
            f"{path} is missing, but metadata.json lists it with {tokens:,} tokens.\n"
            "Copy it again from where the data set came from, or leave it out with `clt data drop-chunk`."
        )
    size = path.stat().st_size
    if size != expected:
        raise DatasetError(
            f"{path} has {size:,} bytes, but {tokens:,} tokens need {expected:,}.\n"
            "It was probably cut off while being copied. Copy it again, or leave it out with `clt data drop-chunk`."
        )


def rows_of(inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> Shaped[Tensor, "token side layer d_model"]:
    """Lay `[layer, token, d_model]` inputs and targets out token by token, in the type they are stored in."""
    layers, tokens, width = inputs.shape
    rows = torch.empty(tokens, 2, layers, width, dtype=dtype)
    rows[:, 0].copy_(inputs.transpose(0, 1))
    rows[:, 1].copy_(targets.transpose(0, 1))
    return rows


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
