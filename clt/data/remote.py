"""Rows behind an activation server, ours or crosslayer-coding's."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clt.data.client import ServerClient
from clt.data.manifest import tokens_per_chunk
from clt.data.metadata import STATISTICS_FILE, DatasetInfo, Metadata, ShardRecord, metadata_from_json
from clt.data.rows import DTYPES, RowLayout
from clt.data.sampler import Runs, rows_of_runs
from clt.data.sources import Rows, ShardSource
from clt.data.statistics import Statistics, read_statistics
from clt.data.wire import unpack_rows
from clt.errors import DatasetError


class RemoteSource(ShardSource):
    """One request per batch from our server; one per chunk and batch from crosslayer-coding's.

    Raises:
        DatasetError: no such data set, no answer, or an answer that makes no sense.
    """

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self._is_ours = client.is_ours()
        self.metadata = self._read_metadata()
        info = self.metadata.info
        self.layout = RowLayout(info.num_layers, info.d_model, self.metadata.dtype)

    def read(self, runs: Runs) -> Rows:
        total = int((runs[:, 2] - runs[:, 1]).sum())
        shape = (total, 2, self.layout.num_layers, self.layout.d_model)
        if self._is_ours:
            data = self.client.rows("rows", {"runs": runs.tolist()})
            return unpack_rows(data, self.client.where, shape, self.layout.value_dtype)
        rows = torch.empty(shape, dtype=self.layout.value_dtype)
        places = _places(runs)
        for shard, (at, wanted) in places.items():
            rows[torch.from_numpy(at)] = self._slice(shard, wanted)
        unknown = torch.full((total,), -1)
        return Rows(rows, unknown, unknown.int(), torch.zeros(total, dtype=torch.uint8))

    def statistics(self) -> Statistics:
        info = self.metadata.info
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / STATISTICS_FILE
            path.write_bytes(self.client.get("norm_stats"))
            return read_statistics(path, info.num_layers, info.d_model, self.metadata.total_tokens)

    def verify(self) -> None:
        """Have the server read every shard, and compare with the metadata.

        Raises:
            DatasetError: naming what differs; or the server is crosslayer-coding's, which keeps no checksums.
        """
        wanted = {shard.file: shard.sha256 for shard in self.metadata.shards if shard.sha256 is not None}
        if not wanted:
            raise DatasetError(f"{self.client.where} has no checksums to compare with: its metadata names none.")
        found = {name: self.client.checksum_of(name) for name in wanted}
        damaged = [f"  {name}: {found[name]} instead of {sha}" for name, sha in wanted.items() if found[name] != sha]
        if damaged:
            raise DatasetError(
                f"{self.client.where}: {len(damaged)} of {len(wanted)} shards lack the SHA-256 that it names:\n"
                + "\n".join(damaged)
                + "\nThey were changed or damaged on the server. Upload them again."
            )

    def _slice(self, shard: int, wanted: np.ndarray) -> torch.Tensor:
        number = int(self.metadata.shards[shard].file.split("_")[1].split(".")[0])
        data = self.client.rows(f"slice?chunk={number}", {"rows": wanted.tolist()})
        layout = self.layout
        expected = len(wanted) * layout.row_bytes
        if len(data) != expected:
            raise DatasetError(
                f"{self.client.where} sent {len(data):,} bytes for {len(wanted):,} rows of chunk {number}, but "
                f"{expected:,} were expected as {layout.dtype}. The chunk or the metadata on the server is damaged."
            )
        values = data.view(layout.torch_dtype)
        return values.view(layout.num_layers, 2, len(wanted), layout.d_model).permute(2, 1, 0, 3)

    def _read_metadata(self) -> Metadata:
        try:
            values = json.loads(self.client.get("info"))
            if self._is_ours and "format" in values:
                return metadata_from_json(values)
            return self._seed_metadata(values)
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{self.client.where}/info lacks or garbles a key ({error!r}).") from None

    def _seed_metadata(self, values: dict[str, Any]) -> Metadata:
        self._is_ours = False
        total, dtype = int(values["total_tokens"]), values.get("dtype", "float32")
        if dtype not in DTYPES:
            raise DatasetError(f"{self.client.where} says dtype = {dtype!r}, which is not one of {', '.join(DTYPES)}.")
        counts = tokens_per_chunk(self.client.get("manifest"), f"{self.client.where}/manifest", total)
        info = DatasetInfo(
            model_name=str(values.get("model_name", "unknown")),
            dataset=str(values.get("dataset", "unknown")),
            split=str(values.get("split", "unknown")),
            num_layers=int(values["num_layers"]),
            d_model=int(values["d_model"]),
        )
        return Metadata(
            info=info,
            format="remote",
            dtype=dtype,
            total_tokens=total,
            shard_tokens=max(counts.values()),
            shards=tuple(ShardRecord(file=f"chunk_{number}.h5", tokens=n) for number, n in sorted(counts.items())),
        )


def _places(runs: Runs) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """For each shard: where in the batch its rows go, and which rows those are, ascending."""
    shards = np.repeat(runs[:, 0], runs[:, 2] - runs[:, 1])
    rows = rows_of_runs(runs)
    order = np.lexsort((rows, shards))
    cuts = np.flatnonzero(np.diff(shards[order])) + 1
    return {int(shards[places[0]]): (places, rows[places]) for places in np.split(order, cuts)}
