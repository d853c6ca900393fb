"""The default codec: token-contiguous rows `[token, side, layer, d_model]` in safetensors shards.

    [8 bytes: header length][JSON header, padded to byte 4096][activations][sample][position][kind]

Side 0 is what the MLP read, side 1 what it wrote. The rows of one token lie together, so a random token costs one
read, and a memory map of the file is the array itself. Any safetensors reader opens the file.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, Int64, Integer, Shaped, UInt8
from torch import Tensor

from clt.errors import DatasetError

DATA_START = 4096
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}


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
    def row_bytes(self) -> int:
        """Bytes of one token's activations."""
        return 2 * self.num_layers * self.d_model * self.torch_dtype.itemsize

    def file_bytes(self, tokens: int) -> int:
        """Size of a whole shard."""
        return DATA_START + tokens * (self.row_bytes + 8 + 4 + 1)


class TokenColumns(NamedTuple):
    """What is known of each token beside its activations."""

    sample: Int64[np.ndarray, " token"]
    position: Int32[np.ndarray, " token"]
    kind: UInt8[np.ndarray, " token"]


class RowFileWriter:
    """One shard in the making: rows arrive in order and are put at shuffled places, so memory stays small.

    The place of the i-th row is the i-th number of a permutation of `capacity` drawn from (seed, shard number). If
    fewer rows come, they are moved together at the end, which keeps their shuffled order.
    """

    def __init__(self, path: Path, layout: RowLayout, capacity: int, seed: tuple[int, int]) -> None:
        self.path = path
        self.layout = layout
        self.capacity = capacity
        self.tokens = 0
        self._places = np.random.default_rng(seed).permutation(capacity)
        self._columns = TokenColumns(
            np.zeros(capacity, np.int64), np.zeros(capacity, np.int32), np.zeros(capacity, np.uint8)
        )
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.capacity - self.tokens

    def put(self, rows: Shaped[Tensor, "token side layer d_model"], columns: TokenColumns) -> None:
        """Add rows of the layout's type; at most `room` of them."""
        places = self._places[self.tokens : self.tokens + rows.shape[0]]
        data = memoryview(rows.contiguous().view(torch.uint8).numpy().data).cast("B")
        width = self.layout.row_bytes
        for i, place in enumerate(places.tolist()):
            _write_all(self._file, data[i * width : (i + 1) * width], DATA_START + place * width)
        for column, values in zip(self._columns, columns, strict=True):
            column[places] = values
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Bring the rows together, write header and columns; the file is then complete under its present name."""
        order = np.sort(self._places[: self.tokens])
        if self.tokens < self.capacity:
            self._close_gaps(order)
        end = DATA_START + self.tokens * self.layout.row_bytes
        tail = b"".join(column[order].tobytes() for column in self._columns)
        _write_all(self._file, memoryview(tail), end)
        _write_all(self._file, memoryview(_header(self.layout, self.tokens)), 0)
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
        if not path.exists():
            raise DatasetError(
                f"{path} is missing, but metadata.json lists it with {tokens:,} tokens.\n"
                "Copy it again from where the data set came from, or generate the data set anew."
            )
        size, expected = path.stat().st_size, layout.file_bytes(tokens)
        if size != expected:
            raise DatasetError(
                f"{path} has {size:,} bytes, but {tokens:,} tokens need {expected:,}.\n"
                "It was probably cut off while being copied. Copy it again, or generate the data set anew."
            )
        self._check_header(path, layout, tokens)
        self.tokens = tokens
        self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        end = DATA_START + tokens * layout.row_bytes
        shape = (tokens, 2, layout.num_layers, layout.d_model)
        self.rows = self._bytes[DATA_START:end].view(layout.torch_dtype).view(shape)
        tail = self._bytes[end:].numpy()
        self.columns = TokenColumns(
            sample=tail[: 8 * tokens].view(np.int64),
            position=tail[8 * tokens : 12 * tokens].view(np.int32),
            kind=tail[12 * tokens :],
        )

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
        expected = _activation_entry(layout, tokens)
        for name in ("dtype", "shape"):
            if header.get(name) != expected[name]:
                raise DatasetError(
                    f"{path} holds activations of {name} {header.get(name)}, but metadata.json says "
                    f"{expected[name]}.\nThe file or metadata.json was replaced or edited."
                )


def rows_of(inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> Shaped[Tensor, "token side layer d_model"]:
    """Lay `[layer, token, d_model]` inputs and targets out token by token, in the type they are stored in."""
    layers, tokens, width = inputs.shape
    rows = torch.empty(tokens, 2, layers, width, dtype=dtype)
    rows[:, 0].copy_(inputs.transpose(0, 1))
    rows[:, 1].copy_(targets.transpose(0, 1))
    return rows


def _activation_entry(layout: RowLayout, tokens: int) -> dict:
    return {
        "dtype": _SAFETENSORS_NAMES[layout.dtype],
        "shape": [tokens, 2, layout.num_layers, layout.d_model],
        "data_offsets": [0, tokens * layout.row_bytes],
    }


def _header(layout: RowLayout, tokens: int) -> bytes:
    entries = {"activations": _activation_entry(layout, tokens)}
    offset = tokens * layout.row_bytes
    for name, dtype, width in (("sample", "I64", 8), ("position", "I32", 4), ("kind", "U8", 1)):
        entries[name] = {"dtype": dtype, "shape": [tokens], "data_offsets": [offset, offset + width * tokens]}
        offset += width * tokens
    text = json.dumps(entries).encode().ljust(DATA_START - 8)
    return len(text).to_bytes(8, "little") + text


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
