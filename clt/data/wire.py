"""Rows on the way between server and client: one safetensors message per batch, never copied as a whole."""

import json

import torch
from jaxtyping import UInt8
from torch import Tensor

from clt.data.sources import Rows
from clt.errors import DatasetError
from clt.types import SAFETENSORS_DTYPES, SAFETENSORS_NAMES

_ORDER = ("sample", "position", "rows", "kind")
"""By falling width, so that each tensor begins at a multiple of its own."""


def pack_rows(rows: Rows) -> list[memoryview]:
    """The message in parts: its header, and the memory of each tensor as it is."""
    entries, parts, at = {}, [], 0
    for name in _ORDER:
        tensor = getattr(rows, name).contiguous()
        end = at + tensor.nbytes
        entries[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        parts.append(memoryview(tensor.flatten().view(torch.uint8).numpy()))
        at = end
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


def unpack_rows(data: UInt8[Tensor, " byte"], where: str, shape: tuple[int, ...], dtype: torch.dtype) -> Rows:
    """The rows of a message, as views of it.

    Raises:
        DatasetError: the message is cut off, or does not hold what was asked for.
    """
    try:
        start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
        header = json.loads(data[8:start].numpy().tobytes())
        rows = Rows(**{name: _view(data[start:], **header[name]) for name in _ORDER})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DatasetError(f"{where} sent {len(data):,} bytes that are no rows ({error!r}).") from None
    if tuple(rows.rows.shape) != shape or rows.rows.dtype != dtype:
        raise DatasetError(
            f"{where} sent rows of {tuple(rows.rows.shape)} {rows.rows.dtype}, but {shape} {dtype} was asked for. "
            "The data set was probably replaced on the server; open it again."
        )
    return rows


def _view(data: Tensor, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    part = data[slice(*data_offsets)]
    if part.storage_offset() % SAFETENSORS_DTYPES[dtype].itemsize:
        part = part.clone()
    return part.view(SAFETENSORS_DTYPES[dtype]).view(shape)
