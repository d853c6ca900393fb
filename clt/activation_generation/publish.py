"""Sending a data set to a server while it is made, and a finished folder to the Hugging Face Hub.

Nothing is deleted here before the server's checksum agrees.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from clt.data.client import ServerClient
from clt.data.hdf5 import tokens_file
from clt.data.metadata import INDEX_FILE, METADATA_FILE, STATISTICS_FILE, ShardRecord
from clt.errors import ConfigError, DatasetError


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


def publish_to_hub(folder: Path, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
    """Put a folder into a data set repository of the Hub, made if need be, and return its address.

    Run again after an interruption, it sends only what the Hub does not have yet.

    Args:
        token: None: the environment's HF_TOKEN, or the saved login.

    Raises:
        ConfigError: the folder is missing or empty, or `repo_id` is no name of a repository.
        DatasetError: the Hub refused, or cannot be reached.
    """
    if not folder.is_dir() or not any(path.is_file() for path in folder.rglob("*")):
        raise ConfigError(f"{folder} is no folder with files, so there is nothing to upload.")
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        is_private = bool(api.repo_info(repo_id, repo_type="dataset").private)
        if is_private != private:
            kinds = {True: "private", False: "public"}
            raise ConfigError(
                f"{repo_id} exists and is {kinds[is_private]}, not {kinds[private]}. Change that in its settings on "
                f"the Hub, or pass --{kinds[is_private]}."
            )
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            ignore_patterns=["**/.*.tmp", ".*.tmp"],
            commit_message="Upload activations",
        )
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no repository name such as USER/NAME: {error}") from None
    except HfHubHTTPError as error:
        raise DatasetError(
            f"The Hub refused {repo_id}: {error}\nA 401 or 403 means a missing or wrong token: it needs write access; "
            "set HF_TOKEN or run `hf auth login`. The same command goes on where it stopped."
        ) from None
    except httpx.HTTPError as error:
        raise DatasetError(
            f"The Hub cannot be reached ({error!r}). The same command goes on where it stopped."
        ) from None
    return str(address)
