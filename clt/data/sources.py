"""Where rows come from: a source knows its shards and reads runs of rows, and nothing of order or epochs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, Int64, Shaped, UInt8
from torch import Tensor

from clt.data.buffers import BufferPool
from clt.data.files import sha256_of
from clt.data.hdf5 import Hdf5Chunk, stored_dtype, tokens_file
from clt.data.manifest import chunk_path, read_index
from clt.data.metadata import (
    HDF5_FORMAT,
    METADATA_FILE,
    ROWS_FORMAT,
    STATISTICS_FILE,
    DatasetInfo,
    Metadata,
    ShardRecord,
    metadata_from_json,
    read_json,
)
from clt.data.quantise import dequantise
from clt.data.rows import DTYPES, RowFile, RowLayout
from clt.data.sampler import Runs, rows_of_runs
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
    def read(self, runs: Runs) -> Rows:
        """The rows of some runs, one run after the other, in the type they are stored in (int8: as bfloat16)."""

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


class LocalSource(ShardSource):
    """Shards in a folder; what a codec adds is how one run is copied into a batch."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder = folder
        self.metadata = metadata
        self.layout = RowLayout(metadata.info.num_layers, metadata.info.d_model, _known_dtype(folder, metadata.dtype))
        self._pool = BufferPool()

    @abstractmethod
    def copy_rows(
        self, shard: int, chosen: slice | Int64[np.ndarray, " token"], out: Shaped[Tensor, "token side layer d_model"]
    ) -> Mapping[str, np.ndarray]:
        """Put some rows of a shard into `out`; returns the columns of the whole shard."""

    def read(self, runs: Runs) -> Rows:
        total = int((runs[:, 2] - runs[:, 1]).sum())
        shape = (total, 2, self.layout.num_layers, self.layout.d_model)
        rows = self._pool.empty(shape, self.layout.value_dtype)
        columns = {"sample": np.empty(total, np.int64), "position": np.empty(total, np.int32)}
        columns["kind"] = np.empty(total, np.uint8)
        at = 0
        for group in np.split(runs, np.flatnonzero(np.diff(runs[:, 0])) + 1):
            chosen, n_tokens = _chosen(group)
            stored = self.copy_rows(int(group[0, 0]), chosen, rows[at : at + n_tokens])
            for name, column in columns.items():
                column[at : at + n_tokens] = stored[name][chosen]
            at += n_tokens
        return Rows(rows, *(torch.from_numpy(column) for column in columns.values()))

    def statistics(self) -> Statistics:
        info = self.metadata.info
        path = self.folder / STATISTICS_FILE
        return read_statistics(path, info.num_layers, info.d_model, self.metadata.total_tokens)

    def verify(self) -> None:
        verify_checksums(self.folder, self.metadata)


class RowSource(LocalSource):
    """Memory-mapped safetensors shards."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder, metadata)
        self._files = [RowFile(folder / shard.file, self.layout, shard.tokens) for shard in metadata.shards]

    def copy_rows(
        self, shard: int, chosen: slice | Int64[np.ndarray, " token"], out: Shaped[Tensor, "token side layer d_model"]
    ) -> Mapping[str, np.ndarray]:
        file = self._files[shard]
        if self.layout.dtype == "int8":
            scale = torch.from_numpy(np.array(file.columns["scale"][chosen]))
            out[:] = dequantise(file.rows[chosen], scale, out.dtype)
        elif isinstance(chosen, slice):
            out[:] = file.rows[chosen]
        else:
            torch.index_select(file.rows, 0, torch.from_numpy(chosen), out=out)
        return file.columns


class Hdf5Source(LocalSource):
    """The seeds' HDF5 chunks, of either version."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder, metadata)
        values = {
            "num_layers": metadata.info.num_layers,
            "d_model": metadata.info.d_model,
            "dtype": metadata.dtype,
        }
        self._chunks = [Hdf5Chunk(folder / shard.file, shard.tokens, values) for shard in metadata.shards]

    def copy_rows(
        self, shard: int, chosen: slice | Int64[np.ndarray, " token"], out: Shaped[Tensor, "token side layer d_model"]
    ) -> Mapping[str, np.ndarray]:
        chunk = self._chunks[shard]
        chunk.read(chosen, out)
        return chunk.columns


def _chosen(runs: Runs) -> tuple[slice | Int64[np.ndarray, " token"], int]:
    """Runs of one shard as an index: a slice if they are neighbours."""
    if np.array_equal(runs[:-1, 2], runs[1:, 1]):
        start, stop = int(runs[0, 1]), int(runs[-1, 2])
        return slice(start, stop), stop - start
    rows = rows_of_runs(runs)
    return rows, len(rows)


def verify_checksums(folder: Path, metadata: Metadata) -> None:
    """Read every shard and compare its SHA-256.

    Raises:
        DatasetError: naming each file that differs.
    """
    files = [(folder / shard.file, shard.sha256) for shard in metadata.shards]
    files += [(tokens_file(folder / shard.file), shard.tokens_sha256) for shard in metadata.shards]
    damaged = [
        f"  {path.name}: {found} instead of {wanted}"
        for path, wanted in files
        if wanted is not None and (found := sha256_of(path)) != wanted
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
    if not (path / METADATA_FILE).exists() and (path / "train").is_dir():
        return path / "train"
    return path


def read_metadata(folder: Path) -> Metadata:
    """What `metadata.json` (ours, or a seed project's with its `index.bin`) says of a folder.

    Raises:
        DatasetError: the folder is missing, unfinished, damaged, or of an unknown format.
    """
    values = read_json(folder)
    try:
        if "format" not in values:
            return _seed_metadata(folder, values)
        metadata = metadata_from_json(values)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{folder}/{METADATA_FILE} lacks or garbles a key ({error!r}).") from None
    listed = sum(shard.tokens for shard in metadata.shards)
    if listed != metadata.total_tokens:
        raise DatasetError(
            f"{folder}/{METADATA_FILE} says total_tokens = {metadata.total_tokens:,}, but its shards hold {listed:,}. "
            "It was edited or damaged."
        )
    return metadata


def open_local(path: str | Path) -> ShardSource:
    """Open a folder of activations, whatever codec it was written with.

    Raises:
        DatasetError: the folder is missing, unfinished, damaged, or of an unknown format.
    """
    folder = data_folder(path)
    return open_metadata(folder, read_metadata(folder))


def open_metadata(folder: Path, metadata: Metadata) -> ShardSource:
    """Open the shards that some metadata lists.

    Raises:
        DatasetError: one of them is missing or damaged, or the format is unknown.
    """
    sources = {ROWS_FORMAT: RowSource, HDF5_FORMAT: Hdf5Source}
    if metadata.format not in sources:
        raise DatasetError(
            f"{folder}/{METADATA_FILE} says format = {metadata.format!r}; known are {' and '.join(sources)}. "
            "A newer version probably wrote it."
        )
    return sources[metadata.format](folder, metadata)


def _seed_metadata(folder: Path, values: dict[str, Any]) -> Metadata:
    """crosslayer-coding's metadata.json has no list of chunks: index.bin has it."""
    total = int(values["total_tokens"])
    counts = read_index(folder, total)
    paths = {number: chunk_path(folder, number) for number in sorted(counts)}
    missing = [path.name for path in paths.values() if not path.exists()]
    if missing:
        raise DatasetError(f"{folder} lacks {', '.join(missing)}, which its index.bin lists. Copy them again.")
    info = DatasetInfo(
        model_name=str(values.get("model_name", "unknown")),
        dataset=str(values.get("dataset", "unknown")),
        split=str(values.get("split", "unknown")),
        num_layers=int(values["num_layers"]),
        d_model=int(values["d_model"]),
        provenance={name: values[name] for name in ("scrambled_from", "scramble_seed") if name in values},
    )
    return Metadata(
        info=info,
        format=HDF5_FORMAT,
        dtype=values.get("dtype") or stored_dtype(next(iter(paths.values()))),
        total_tokens=total,
        shard_tokens=int(values.get("chunk_tokens", max(counts.values()))),
        shards=tuple(ShardRecord(file=path.name, tokens=counts[number]) for number, path in paths.items()),
        created=str(values.get("created", "")),
    )


def _known_dtype(folder: Path, dtype: str) -> str:
    if dtype not in DTYPES:
        raise DatasetError(
            f"{folder}/{METADATA_FILE} says dtype = {dtype!r}, which is not one of {', '.join(DTYPES)}. "
            "It was edited, or a newer version wrote it."
        )
    return dtype
