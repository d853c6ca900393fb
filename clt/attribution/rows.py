"""Rows on disk while a graph is computed: sparse, appended batch by batch, found again after a kill.

Three plain files in a folder: `rows.bin` (records: row id, layer it is read at, number of entries, sum of absolute
entries, what it adds up to), `columns.bin` (int32) and `weights.bin` (float32). The index is written last, so a row it
lists is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64
from numpy.typing import NDArray
from torch import Tensor

from clt.config.base import write_text_atomically
from clt.errors import GraphError

_RECORD = np.dtype([("row", "<i8"), ("layer", "<i8"), ("count", "<i8"), ("size", "<f8"), ("value", "<f8")])


class StoredRow(NamedTuple):
    """One row's non-zero entries."""

    row: int
    layer: int
    size: float
    """Sum of absolute entries, the bias column left out."""
    value: float
    columns: NDArray[np.int32]
    weights: NDArray[np.float32]


class RowStore:
    """Rows of a graph under way; the last column is the bias."""

    def __init__(self, folder: Path, made_of: Mapping[str, Any], bias_column: int) -> None:
        """Open or start.

        Args:
            made_of: what the rows depend on; a folder of anything else is refused.

        Raises:
            GraphError: the folder holds the rows of another graph.
        """
        self.folder, self._bias = folder, bias_column
        folder.mkdir(parents=True, exist_ok=True)
        self._check(dict(made_of))
        self._records: list[Any] = []
        if (folder / "rows.bin").exists():
            self._records = list(np.fromfile(folder / "rows.bin", dtype=_RECORD))
        entries = sum(int(record["count"]) for record in self._records)
        for name in ("columns.bin", "weights.bin"):
            with open(folder / name, "ab") as file:
                file.truncate(4 * entries)
        self._starts = [0]
        for record in self._records:
            self._starts.append(self._starts[-1] + int(record["count"]))

    def _check(self, made_of: dict[str, Any]) -> None:
        path, text = self.folder / "made_of.json", json.dumps(made_of, sort_keys=True)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise GraphError(
                f"{self.folder} holds rows of another graph (prompt, model, transcoder, options or the number of "
                "threads differ). Delete it, or name another --work-dir."
            )
        write_text_atomically(path, text)

    @property
    def row_ids(self) -> list[int]:
        """Ids of the rows that are there, in the order they came."""
        return [int(record["row"]) for record in self._records]

    def append(
        self,
        ids: Sequence[int],
        layers: Sequence[int],
        values: Sequence[float],
        rows: Float32[Tensor, "row column"],
    ) -> None:
        """Write a batch of rows."""
        records = np.zeros(len(ids), dtype=_RECORD)
        dense = rows.numpy()
        chosen = [np.flatnonzero(row).astype(np.int32) for row in dense]
        kept = [row[columns] for row, columns in zip(dense, chosen)]
        records["row"], records["layer"], records["value"] = ids, layers, values
        records["count"] = [len(columns) for columns in chosen]
        records["size"] = np.abs(dense[:, : self._bias]).sum(1, dtype=np.float64)
        for name, parts in (("columns.bin", chosen), ("weights.bin", kept)):
            with open(self.folder / name, "ab") as file:
                np.concatenate(parts).tofile(file)
        with open(self.folder / "rows.bin", "ab") as file:
            records.tofile(file)
        for record in records:
            self._records.append(record)
            self._starts.append(self._starts[-1] + int(record["count"]))

    def from_the_top(self) -> Iterator[StoredRow]:
        """All rows, those read at higher layers first."""
        order = sorted(range(len(self._records)), key=lambda place: -int(self._records[place]["layer"]))
        return self._read(order)

    def in_order(self) -> Iterator[StoredRow]:
        """All rows by id."""
        ids = self.row_ids
        return self._read(sorted(range(len(ids)), key=ids.__getitem__))

    def _read(self, order: Sequence[int]) -> Iterator[StoredRow]:
        if not self._starts[-1]:
            columns, weights = np.zeros(0, np.int32), np.zeros(0, np.float32)
        else:
            columns = np.memmap(self.folder / "columns.bin", np.int32, "r")
            weights = np.memmap(self.folder / "weights.bin", np.float32, "r")
        for place in order:
            record, part = self._records[place], slice(self._starts[place], self._starts[place + 1])
            ints = int(record["row"]), int(record["layer"])
            yield StoredRow(*ints, float(record["size"]), float(record["value"]), columns[part], weights[part])

    def save_queue(self, queue: Sequence[int]) -> None:
        """Remember which rows are to come next, so that a ranking made once is not made again."""
        write_text_atomically(self.folder / "queue.json", json.dumps(list(queue)))

    def queue(self) -> list[int]:
        """Rows that were ranked but not computed before an interruption."""
        path = self.folder / "queue.json"
        known = set(self.row_ids)
        return (
            [row for row in json.loads(path.read_text(encoding="utf-8")) if row not in known] if path.exists() else []
        )


def influence_so_far(store: RowStore, weights: Mapping[int, float], n_columns: int) -> Float64[np.ndarray, " column"]:
    """Influence of every column on the targets through the rows there are.

    Args:
        weights: of the targets, by row id; row ids below `n_columns` are columns too.

    Source: circuit-tracer 0.4.1, `compute_partial_influences`; as in prune.py one walk from the top is the whole sum.
    """
    influence = np.zeros(n_columns)
    for row in store.from_the_top():
        through = weights[row.row] if row.row in weights else influence[row.row]
        if through and row.size:
            share = np.abs(row.weights.astype(np.float64))
            share[row.columns >= n_columns] = 0
            influence[np.minimum(row.columns, n_columns - 1)] += share * (through / max(row.size, 1e-8))
    return influence
