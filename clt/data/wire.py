"""Rows on the way between server and client: one safetensors message per batch."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from clt.data.sources import Rows
from clt.errors import DatasetError


def pack_rows(rows: Rows) -> bytes:
    """The message."""
    return save({name: tensor.contiguous() for name, tensor in rows._asdict().items()})


def unpack_rows(data: bytes, where: str, shape: tuple[int, ...], dtype: torch.dtype) -> Rows:
    """The rows of a message.

    Raises:
        DatasetError: the message is cut off, or does not hold what was asked for.
    """
    try:
        rows = Rows(**load(data))
    except (SafetensorError, TypeError) as error:
        raise DatasetError(f"{where} sent {len(data):,} bytes that are no rows ({error}).") from None
    if tuple(rows.rows.shape) != shape or rows.rows.dtype != dtype:
        raise DatasetError(
            f"{where} sent rows of {tuple(rows.rows.shape)} {rows.rows.dtype}, but {shape} {dtype} was asked for. "
            "The data set was probably replaced on the server; open it again."
        )
    return rows
