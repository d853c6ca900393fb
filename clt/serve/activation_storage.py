"""The server's disk: ids and names are checked here, files appear whole, and nothing leaves the root."""

import hashlib
import os
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import h5py
from fastapi.concurrency import run_in_threadpool
from safetensors import SafetensorError, safe_open

from clt.data.files import replace_file, sha256_of
from clt.data.metadata import INDEX_FILE, METADATA_FILE, STATISTICS_FILE
from clt.data.sources import ShardSource, open_local
from clt.data.statistics import SIDES
from clt.errors import CLTError

SHARD_NAME = re.compile(r"(chunk_\d{1,9}\.(h5|hdf5|tokens\.safetensors)|shard_\d{5,9}\.safetensors)")
LAYER_NAME = re.compile(r"layer_\d{1,6}")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_LONGEST_ID = 200


class Refused(CLTError):
    """A request that is answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class DatasetStorage:
    """Data sets as folders under one root.

    Args:
        root: made if missing.
        quota_bytes: the root may hold this much; None: as much as the disk.
    """

    def __init__(self, root: Path, quota_bytes: int | None = None) -> None:
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self._quota_bytes = quota_bytes
        self._sources: dict[str, tuple[tuple[int, int], ShardSource]] = {}
        self._lock = threading.Lock()

    def folder(self, dataset_id: str) -> Path:
        """Where a data set is (or would be).

        Raises:
            Refused: 400, the id could name something outside the root.
        """
        segments = dataset_id.split("/")
        if len(dataset_id) > _LONGEST_ID or not all(_SEGMENT.fullmatch(segment) for segment in segments):
            raise Refused(
                400,
                f"{dataset_id[:_LONGEST_ID]!r} is no data set id: letters, digits, '.', '_' and '-', parts divided by "
                "'/', none of which begins with a dot or a dash.",
            )
        folder = (self.root / dataset_id).resolve()
        if not folder.is_relative_to(self.root) or folder == self.root:
            raise Refused(400, f"{dataset_id!r} leads out of the server's root.")
        return folder

    def list(self) -> list[str]:
        """The ids of all finished data sets."""
        return sorted(str(path.parent.relative_to(self.root)) for path in self.root.rglob(METADATA_FILE))

    def read(self, dataset_id: str, name: str) -> Path:
        """The path of one file of a data set.

        Raises:
            Refused: 404, there is none.
        """
        if name not in (INDEX_FILE, METADATA_FILE, STATISTICS_FILE) and not SHARD_NAME.fullmatch(name):
            raise Refused(400, f"{name[:80]!r} is no file of a data set.")
        path = self.folder(dataset_id) / name
        if not path.is_file():
            raise Refused(404, f"{dataset_id} has no {name}.")
        return path

    def source(self, dataset_id: str) -> ShardSource:
        """The data set, opened; opened again when its metadata has changed.

        Raises:
            Refused: 404, there is no finished data set.
            DatasetError: it is damaged.
        """
        status = self.read(dataset_id, METADATA_FILE).stat()
        version = (status.st_mtime_ns, status.st_ino)
        with self._lock:
            known = self._sources.get(dataset_id)
            if known is None or known[0] != version:
                known = (version, open_local(self.folder(dataset_id)))
                self._sources[dataset_id] = known
            return known[1]

    def save(self, dataset_id: str, name: str, data: bytes, *, overwrite: bool = False) -> None:
        """Write a small file.

        Raises:
            Refused: 409, there is another one already.
        """
        folder = self.folder(dataset_id)
        self.require_room(len(data))
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.{threading.get_ident()}.part"
        temporary.write_bytes(data)
        self._publish(temporary, folder / name, overwrite)

    def save_chunk(self, dataset_id: str, name: str, temporary: Path, checksum: str | None, overwrite: bool) -> str:
        """Make an uploaded file visible once its checksum and its content are right; returns its SHA-256.

        Raises:
            Refused: 422, it is not what was sent or no chunk; 409, there is another one already.
        """
        found = sha256_of(temporary)
        if checksum is not None and checksum.lower() != found:
            temporary.unlink()
            raise Refused(422, f"{name} arrived with SHA-256 {found}, but {checksum[:64]} was sent. Send it again.")
        if not _is_chunk(temporary, name):
            temporary.unlink()
            raise Refused(422, f"{name} is no HDF5 file with layers and no safetensors file.")
        self._publish(temporary, self.folder(dataset_id) / name, overwrite)
        return found

    def part(self, dataset_id: str, name: str) -> Path:
        """The unfinished upload of a file; invisible to readers."""
        if not SHARD_NAME.fullmatch(name):
            raise Refused(400, f"{name[:80]!r} is no name of a chunk.")
        return self.folder(dataset_id) / f".{name}.part"

    async def append(self, part: Path, offset: int, stream: AsyncIterator[bytes]) -> int:
        """Add to an unfinished upload; returns how many bytes there are now.

        Raises:
            Refused: 409, the upload is not at that offset.
        """
        have = part.stat().st_size if part.exists() else 0
        if offset != have:
            raise Refused(409, f"The upload has {have} bytes, so it cannot go on at {offset}.")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            async for block in stream:
                await run_in_threadpool(file.write, block)
        return part.stat().st_size

    def require_room(self, n_bytes: int) -> None:
        """Refuse what would not fit.

        Raises:
            Refused: 507, the quota is used up.
        """
        if self._quota_bytes is None:
            return
        used = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        if used + n_bytes > self._quota_bytes:
            raise Refused(507, f"{n_bytes:,} bytes do not fit: {used:,} of {self._quota_bytes:,} are used.")

    def _publish(self, temporary: Path, final: Path, overwrite: bool) -> None:
        with self._lock:
            if final.exists() and not overwrite and _digest(final) != _digest(temporary):
                temporary.unlink()
                raise Refused(
                    409, f"{final.name} exists with another content. Send the header X-Overwrite: true to replace it."
                )
            os.chmod(temporary, 0o644)
            replace_file(temporary, final)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _is_chunk(path: Path, name: str) -> bool:
    if name.endswith(".safetensors"):
        try:
            with safe_open(path, framework="np") as file:
                return bool(list(file.keys()))
        except SafetensorError:
            return False
    if not h5py.is_hdf5(path):
        return False
    try:
        with h5py.File(path, "r") as file:
            shapes = {_layer_shape(file, str(key)) for key in file}
    except (OSError, RuntimeError):
        return False
    return len(shapes) == 1 and None not in shapes


def _layer_shape(file: h5py.File, key: str) -> tuple[int, ...] | None:
    """The one shape of a layer's inputs and targets; None if it is no layer."""
    arrays = [file.get(f"{key}/{side}") for side in SIDES]
    shapes = {array.shape for array in arrays if isinstance(array, h5py.Dataset) and array.ndim == 2}
    if not LAYER_NAME.fullmatch(key) or len(shapes) != 1 or not all(isinstance(a, h5py.Dataset) for a in arrays):
        return None
    return shapes.pop()
