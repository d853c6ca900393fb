"""Sending a data set to a server while it is made; nothing is deleted here before the server's checksum agrees."""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from clt.data.client import ServerClient
from clt.data.hdf5 import tokens_file
from clt.data.metadata import INDEX_FILE, METADATA_FILE, STATISTICS_FILE, ShardRecord
from clt.errors import ConfigError


class Publisher:
    """Uploads the shards of one folder in the background, in order; manifest and metadata come last.

    Args:
        folder: where the shards are.
        client: the data set on the server.
        delete_after_upload: delete each shard here once the server has it.
    """

    def __init__(self, folder: Path, client: ServerClient, *, delete_after_upload: bool) -> None:
        self._folder = folder
        self._client = client
        self._delete = delete_after_upload
        self._is_ours = client.is_ours()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clt-upload")
        self._uploads: dict[str, Future[None]] = {}

    def shard(self, record: ShardRecord) -> None:
        """Upload a finished shard; a file that is gone was uploaded by an earlier run.

        Raises:
            DatasetError: an earlier upload failed.
            ConfigError: the server cannot take this format.
        """
        if not self._is_ours and not record.file.startswith("chunk_"):
            raise ConfigError(
                f"{self._client.where} is crosslayer-coding's server, which only takes HDF5 chunks. "
                "Use --output-format hdf5, or our server (`clt serve activations`)."
            )
        for upload in self._uploads.values():
            if upload.done():
                upload.result()
        if record.file not in self._uploads:
            self._uploads[record.file] = self._thread.submit(self._send, record)

    def finish(self, shards: Sequence[ShardRecord]) -> None:
        """Wait for all shards, then send statistics, manifest and metadata.

        Raises:
            DatasetError: an upload failed after all attempts; what was not uploaded is still here.
        """
        for record in shards:
            self.shard(record)
        for upload in self._uploads.values():
            upload.result()
        self._client.put_json("norm_stats", json.loads((self._folder / STATISTICS_FILE).read_text()))
        self._client.put_manifest((self._folder / INDEX_FILE).read_bytes())
        self._client.put_json("metadata", json.loads((self._folder / METADATA_FILE).read_text()))

    def close(self) -> None:
        """Stop after the upload under way."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _send(self, record: ShardRecord) -> None:
        chunk = self._folder / record.file
        for path in (tokens_file(chunk), chunk) if record.file.startswith("chunk_") else (chunk,):
            if path.exists():
                self._send_file(path)
                if self._delete:
                    path.unlink()

    def _send_file(self, path: Path) -> None:
        if self._is_ours:
            self._client.upload(path)
        elif path.suffix in (".h5", ".hdf5"):
            self._client.upload_the_seeds_way(int(path.stem.split("_")[1]), path)
