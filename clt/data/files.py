"""Files that appear whole or not at all, their checksums, and a disk that is full."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clt.errors import DatasetError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def replace_file(temporary: Path, final: Path) -> None:
    """Make a finished temporary file visible under its final name; both survive a power cut after this returns."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_file(path: Path, data: bytes) -> None:
    """Write bytes so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with refusing_a_full_disk(path.parent, len(data)):
        temporary.write_bytes(data)
        replace_file(temporary, path)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def refusing_a_full_disk(folder: Path, bytes_needed: int) -> Iterator[None]:
    """Turn "no space left" into an error that says how much is missing and what to do.

    Raises:
        DatasetError: the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        free = shutil.disk_usage(folder).free
        raise DatasetError(
            f"{folder} has no room: {bytes_needed:,} bytes are needed, {free:,} are free.\n"
            "Make space (or choose another folder) and run the same command again: finished shards are kept, "
            "and it goes on after the last of them."
        ) from error
