"""Where rows come from: a source knows its shards and reads runs of rows, and nothing of order or epochs."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, Int64, Shaped, UInt8
from torch import Tensor

from clt.data.buffers import BufferPool
from clt.data.files import sha256_of
from clt.data.metadata import (
    ROWS_FORMAT,
    STATISTICS_FILE,
    Metadata,
    metadata_from_json,
    read_json,
)
from clt.data.rows import DTYPES, RowFile, RowLayout
from clt.data.sampler import Run
from clt.data.statistics import Statistics, read_statistics
from clt.errors import DatasetError


class Rows(NamedTuple):
    """Some tokens as they are stored."""

    rows: Shaped[Tensor, "token side layer d_model"]
    sample: Int64[Tensor, " token"]
    position: Int32[Tensor, " token"]
    kind: UInt8[Tensor, " token"]


class ShardSource(ABC):
    """Shards of rows behind some way to read them."""

    metadata: Metadata

    @abstractmethod
    def read(self, runs: list[Run]) -> Rows:
        """The rows of some runs, one run after the other, in the type they are stored in."""

    @abstractmethod
    def statistics(self) -> Statistics:
        """Mean and spread over all tokens.

        Raises:
            DatasetError: the data set was written without them.
        """

    @abstractmethod
    def verify(self) -> None:
        """Check everything against its checksum.

        Raises:
            DatasetError: naming each file that differs.
        """


class LocalRowSource(ShardSource):
    """Memory-mapped safetensors shards in a folder."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder = folder
        self.metadata = metadata
        if metadata.dtype not in DTYPES:
            raise DatasetError(
                f"{folder} says dtype = {metadata.dtype!r}, which is not one of {', '.join(DTYPES)}. "
                "metadata.json was edited, or a newer version wrote it."
            )
        self.layout = RowLayout(metadata.info.num_layers, metadata.info.d_model, metadata.dtype)
        self._files = [RowFile(folder / shard.file, self.layout, shard.tokens) for shard in metadata.shards]
        self._pool = BufferPool()

    def read(self, runs: list[Run]) -> Rows:
        total = sum(run.stop - run.start for run in runs)
        shape = (total, 2, self.layout.num_layers, self.layout.d_model)
        rows = self._pool.empty(shape, self.layout.torch_dtype)
        columns = (np.empty(total, np.int64), np.empty(total, np.int32), np.empty(total, np.uint8))
        at = 0
        for shard, start, stop in runs:
            file, end = self._files[shard], at + stop - start
            rows[at:end] = file.rows[start:stop]
            for column, stored in zip(columns, file.columns, strict=True):
                column[at:end] = stored[start:stop]
            at = end
        return Rows(rows, *(torch.from_numpy(column) for column in columns))

    def statistics(self) -> Statistics:
        info = self.metadata.info
        return read_statistics(self.folder / STATISTICS_FILE, info.num_layers, info.d_model, self.metadata.total_tokens)

    def verify(self) -> None:
        verify_checksums(self.folder, self.metadata)


def verify_checksums(folder: Path, metadata: Metadata) -> None:
    """Read every shard and compare its SHA-256.

    Raises:
        DatasetError: naming each file that differs.
    """
    damaged = [
        f"  {shard.file}: {found} instead of {shard.sha256}"
        for shard in metadata.shards
        if shard.sha256 is not None and (found := sha256_of(folder / shard.file)) != shard.sha256
    ]
    if damaged:
        raise DatasetError(
            f"{folder}: {len(damaged)} of {len(metadata.shards)} shards do not have the SHA-256 in metadata.json:\n"
            + "\n".join(damaged)
            + "\nThey were changed or damaged after they were written. Copy them again, or generate the data set anew."
        )


def data_folder(path: str | Path) -> Path:
    """The folder with the activations: the one given, or its `train` part if it is divided."""
    path = Path(path)
    if not (path / "metadata.json").exists() and (path / "train").is_dir():
        return path / "train"
    return path


def open_local(path: str | Path) -> ShardSource:
    """Open a folder of activations, whatever codec it was written with.

    Raises:
        DatasetError: the folder is missing, unfinished, damaged, or of an unknown format.
    """
    folder = data_folder(path)
    values = read_json(folder)
    if values.get("format") != ROWS_FORMAT:
        raise DatasetError(f"{folder}/metadata.json says format = {values.get('format')!r}, which cannot be read here.")
    try:
        metadata = metadata_from_json(values)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{folder}/metadata.json lacks or garbles a key ({error!r}).") from None
    listed = sum(shard.tokens for shard in metadata.shards)
    if listed != metadata.total_tokens:
        raise DatasetError(
            f"{folder}/metadata.json says total_tokens = {metadata.total_tokens:,}, but its shards hold {listed:,}. "
            "It was edited or damaged."
        )
    return LocalRowSource(folder, metadata)
