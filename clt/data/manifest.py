"""`index.bin` in both of the seeds' versions, and the chunk files it speaks of.

Version 1: one record per row, `(chunk uint32, row uint32)`. Version 2: one record per chunk, `(chunk int32, tokens
int32, offset int64)`. Neither has a header; the sizes decide, and then whether the numbers make sense.
"""

from pathlib import Path

import numpy as np

from clt.data.metadata import INDEX_FILE, INDEX_RECORD
from clt.errors import DatasetError

_ROW_RECORD = np.dtype([("chunk", "<u4"), ("row", "<u4")])


def tokens_per_chunk(data: bytes, where: str, total_tokens: int) -> dict[int, int]:
    """How many rows each chunk has, from the content of an `index.bin` of either version.

    Raises:
        DatasetError: it is neither, or disagrees with metadata.json.
    """
    if len(data) % INDEX_RECORD.itemsize == 0:
        records = np.frombuffer(data, INDEX_RECORD)
        if _is_version_2(records):
            counts = dict(zip(records["chunk"].tolist(), records["tokens"].tolist(), strict=True))
            return _require_total(counts, where, total_tokens)
    if len(data) % _ROW_RECORD.itemsize:
        raise DatasetError(f"{where} has {len(data):,} bytes, which is no whole number of records. It was cut off.")
    rows = np.frombuffer(data, _ROW_RECORD)
    counts = _count_rows(rows, where)
    return _require_total(counts, where, total_tokens)


def read_index(folder: Path, total_tokens: int) -> dict[int, int]:
    """Rows per chunk of a folder.

    Raises:
        DatasetError: the manifest is missing, damaged, or disagrees with metadata.json.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        raise DatasetError(
            f"{path} is missing. The seeds write it last, so the data set was never finished; generate it anew."
        )
    return tokens_per_chunk(path.read_bytes(), str(path), total_tokens)


def chunk_path(folder: Path, number: int) -> Path:
    """The file of a chunk: `.h5` of version 1 and of servers, or `.hdf5` of version 2."""
    old = folder / f"chunk_{number}.h5"
    return old if old.exists() else folder / f"chunk_{number}.hdf5"


def _is_version_2(records: np.ndarray) -> bool:
    offsets = np.cumsum(records["tokens"], dtype=np.int64) - records["tokens"]
    ascending = bool((np.diff(records["chunk"]) > 0).all())
    return bool(len(records) and ascending and np.array_equal(records["offset"], offsets))


def _count_rows(rows: np.ndarray, where: str) -> dict[int, int]:
    """Each chunk's rows must be 0 to n - 1, each once, in whatever order the manifest lists them."""
    counts = {}
    order = np.argsort(rows["chunk"], kind="stable")
    chunks, starts = np.unique(rows["chunk"][order], return_index=True)
    for chunk, part in zip(chunks.tolist(), np.split(rows["row"][order], starts[1:]), strict=True):
        if not np.array_equal(np.sort(part), np.arange(len(part))):
            raise DatasetError(
                f"{where} lists {len(part):,} rows of chunk {chunk}, but they are not 0 to {len(part) - 1:,}, each "
                "once. It is damaged, or was made with another tool."
            )
        counts[chunk] = len(part)
    return counts


def _require_total(counts: dict[int, int], where: str, total_tokens: int) -> dict[int, int]:
    listed = sum(counts.values())
    if listed != total_tokens:
        raise DatasetError(
            f"{where} lists {listed:,} tokens, but metadata.json says total_tokens = {total_tokens:,}. "
            "One of the two belongs to another data set, or was cut off."
        )
    return counts
