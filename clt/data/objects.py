"""Rows in an object store or behind a web server, read by ranges: `s3://`, `gs://`, `az://`, `hf://`, `http(s)://`."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import obstore
import torch
from obstore.exceptions import BaseError
from obstore.store import from_url

from clt.data.hub import HUB_ERRORS, HUB_SCHEME, HubFolder
from clt.data.metadata import METADATA_FILE, ROWS_FORMAT, STATISTICS_FILE, metadata_from_json
from clt.data.rows import DATA_START, RowLayout
from clt.data.sampler import Runs
from clt.data.sources import Rows, ShardSource
from clt.data.statistics import Statistics, read_statistics
from clt.errors import DatasetError


def is_url(path: str | Path) -> bool:
    """Whether a path names an object store rather than a folder."""
    return "://" in str(path)


class _Place(Protocol):
    """Files that can be read by ranges."""

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def get(self, name: str) -> bytes:
        """A whole file."""
        ...

    def ranges(self, name: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Some ranges of a file."""
        ...


class _ObjectStore:
    """What obstore opens: clouds, web servers, folders."""

    def __init__(self, url: str) -> None:
        options = {"allow_http": url.startswith("http://")} if url.startswith("http") else None
        self._store = from_url(url, client_options=options)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def size(self, name: str) -> int:
        return obstore.head(self._store, name)["size"]

    def get(self, name: str) -> bytes:
        return bytes(obstore.get(self._store, name).bytes())

    def ranges(self, name: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        return [bytes(block) for block in obstore.get_ranges(self._store, name, starts=starts, ends=ends)]


# Per request of a checksum; what it needs in memory.
_BLOCK_BYTES = 16 * 2**20
_ERRORS = (BaseError, *HUB_ERRORS)


class ObjectSource(ShardSource):
    """A finished data set of rows under a URL; credentials come from the environment, as the stores' own tools do it.

    The small columns of each shard are fetched once, when it is first read; activations range by range.

    Raises:
        DatasetError: it is not there, not reachable, or not in the format of rows.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._place: _Place = HubFolder(self.url) if self.url.startswith(HUB_SCHEME) else _ObjectStore(self.url)
        try:
            values = json.loads(self._get(METADATA_FILE))
            if values.get("format") != ROWS_FORMAT or values["dtype"] == "int8":
                raise DatasetError(
                    f"{self.url} is {values.get('format', 'a seed data set')} as {values.get('dtype')}; only rows in "
                    "float types can be read by ranges. `clt data convert` makes them, or serve it with `clt serve`."
                )
            self.metadata = metadata_from_json(values)
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{self.url}/{METADATA_FILE} lacks or garbles a key ({error!r}).") from None
        info = self.metadata.info
        self.layout = RowLayout(info.num_layers, info.d_model, self.metadata.dtype)
        self._whole: set[int] = set()
        self._columns: dict[int, dict[str, np.ndarray]] = {}

    def read(self, runs: Runs) -> Rows:
        places = np.concatenate([[0], np.cumsum(runs[:, 2] - runs[:, 1])])
        total = int(places[-1])
        rows = torch.empty(total, 2, self.layout.num_layers, self.layout.d_model, dtype=self.layout.torch_dtype)
        columns = {name: np.empty(total, dtype) for name, (_, dtype, _) in self.layout.columns.items()}
        for shard in np.unique(runs[:, 0]).tolist():
            chosen = np.flatnonzero(runs[:, 0] == shard)
            blocks = self._ranges(shard, runs[chosen])
            for i, block in zip(chosen, blocks, strict=True):
                part = slice(int(places[i]), int(places[i + 1]))
                rows[part] = torch.frombuffer(bytearray(block), dtype=rows.dtype).view(rows[part].shape)
                for name, column in columns.items():
                    column[part] = self._column(shard)[name][runs[i, 1] : runs[i, 2]]
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        return Rows(rows, tensors["sample"], tensors["position"], tensors["kind"])

    def statistics(self) -> Statistics:
        info = self.metadata.info
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / STATISTICS_FILE
            path.write_bytes(self._get(STATISTICS_FILE))
            return read_statistics(path, info.num_layers, info.d_model, self.metadata.total_tokens)

    def verify(self) -> None:
        """Read every shard, a block at a time, and compare its size and its SHA-256.

        Raises:
            DatasetError: naming the first shard that is missing, of another size, or changed.
        """
        self.verify_sizes()
        for record in self.metadata.shards:
            if record.sha256 is None:
                continue
            found = self._sha256(record.file, self.layout.file_bytes(record.tokens))
            if found != record.sha256:
                raise DatasetError(
                    f"{self.url}/{record.file} has the SHA-256 {found}, {METADATA_FILE} says {record.sha256}.\n"
                    "It was changed or damaged after it was written. Copy it again, or generate the data set anew."
                )

    def verify_sizes(self) -> None:
        """Compare the size of every shard, which asks for no rows.

        Raises:
            DatasetError: naming the first shard that is missing or of another size.
        """
        for shard in range(len(self.metadata.shards)):
            self._require_whole(shard)

    def _sha256(self, name: str, size: int) -> str:
        digest = hashlib.sha256()
        for start in range(0, size, _BLOCK_BYTES):
            try:
                (block,) = self._place.ranges(name, [start], [min(start + _BLOCK_BYTES, size)])
            except _ERRORS as error:
                raise DatasetError(f"{self.url}/{name} cannot be read ({_first_line(error)}).") from None
            digest.update(block)
        return digest.hexdigest()

    def _require_whole(self, shard: int) -> None:
        # Also because obstore panics at ranges beyond the end of an object.
        record = self.metadata.shards[shard]
        expected = self.layout.file_bytes(record.tokens)
        try:
            size = self._place.size(record.file)
        except _ERRORS as error:
            raise DatasetError(f"{self.url}/{record.file} cannot be found ({_first_line(error)}).") from None
        if size != expected:
            raise DatasetError(
                f"{self.url}/{record.file} has {size:,} bytes, but {record.tokens:,} tokens need {expected:,}. "
                "It was probably cut off while being copied; copy it again."
            )
        self._whole.add(shard)

    def _ranges(self, shard: int, runs: Runs) -> list[bytes]:
        starts, ends = (DATA_START + runs[:, 1:] * self.layout.row_bytes).T.tolist()
        name = self.metadata.shards[shard].file
        if shard not in self._whole:
            self._require_whole(shard)
        try:
            return self._place.ranges(name, starts, ends)
        except _ERRORS as error:
            raise DatasetError(
                f"{self.url}/{name} cannot be read ({_first_line(error)}). Is it there, and whole?"
            ) from None

    def _column(self, shard: int) -> dict[str, np.ndarray]:
        if shard not in self._columns:
            record = self.metadata.shards[shard]
            at = DATA_START + record.tokens * self.layout.row_bytes
            end = self.layout.file_bytes(record.tokens)
            try:
                (data,) = self._place.ranges(record.file, [at], [end])
            except _ERRORS as error:
                raise DatasetError(f"{self.url}/{record.file} cannot be read ({_first_line(error)}).") from None
            found, begin = {}, 0
            for name, (_, dtype, _) in self.layout.columns.items():
                stop = begin + record.tokens * dtype.itemsize
                found[name] = np.frombuffer(data[begin:stop], dtype)
                begin = stop
            self._columns[shard] = found
        return self._columns[shard]

    def _get(self, name: str) -> bytes:
        try:
            return self._place.get(name)
        except _ERRORS as error:
            raise DatasetError(
                f"{self.url}/{name} cannot be read ({_first_line(error)}).\n"
                "Is the address right, and are credentials in the environment (AWS_*, GOOGLE_*, AZURE_*, HF_TOKEN)?"
            ) from None


def _first_line(error: Exception) -> str:
    """Without the pages of context that obstore adds."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
