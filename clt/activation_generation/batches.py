"""From a corpus to numbered batches of rows: the same corpus and options give the same batches, every time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from clt.activation_generation.packing import TextPacker
from clt.lm import HostInputs, ModelAdapter
from clt.types import Sample

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True)
class RowBatch:
    """Rows for one forward pass, all of one split."""

    mark: int
    """Number of the batch in the stream."""
    split: Split
    rows: tuple[list[int] | Sample, ...]
    """Token ids, or samples that the host's own processor turns into tokens."""
    numbers: tuple[int, ...]
    """The number of each row, which becomes the `sample` of its tokens."""

    def prepare(self, adapter: ModelAdapter) -> HostInputs:
        """The tensors the host takes."""
        samples = [row for row in self.rows if isinstance(row, Sample)]
        if samples:
            return adapter.prepare(samples)
        rows = [torch.tensor(row) for row in self.rows]
        mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return adapter.prepare_tokens(pad(rows, batch_first=True), pad(mask, batch_first=True))


class BatchPlanner:
    """Collects the rows of each split until a batch is full.

    Args:
        packers: make rows of text, one packer per split; None: every sample is prepared by the host's processor.
        batch_rows: rows per batch.
        pack: join texts; False: one text per row.
    """

    def __init__(self, packers: dict[Split, TextPacker] | None, batch_rows: int, pack: bool) -> None:
        self._packers = packers
        self._batch_rows = batch_rows
        self._pack = pack
        self._waiting: dict[Split, list[list[int] | Sample]] = {split: [] for split in SPLITS}
        self._numbers: dict[Split, list[int]] = {split: [] for split in SPLITS}
        self._next_number = 0
        self._next_mark = 0

    def __call__(self, samples: Iterable[tuple[Sample, Split]]) -> Iterator[RowBatch]:
        """All batches of a corpus."""
        for sample, split in samples:
            for row in self._rows(sample, split):
                yield from self._add(split, row)
        for split in SPLITS:
            for row in self._packers[split].flush() if self._packers else ():
                yield from self._add(split, row)
        for split in SPLITS:
            if self._waiting[split]:
                yield self._emit(split)

    def _rows(self, sample: Sample, split: Split) -> Iterator[list[int] | Sample]:
        if self._packers is None or sample.images:
            yield sample
        elif self._pack:
            yield from self._packers[split].add([sample.prompt])
        elif row := self._packers[split].single(sample.prompt):
            yield row

    def _add(self, split: Split, row: list[int] | Sample) -> Iterator[RowBatch]:
        waiting = self._waiting[split]
        if waiting and isinstance(waiting[0], Sample) != isinstance(row, Sample):
            yield self._emit(split)
        self._waiting[split].append(row)
        self._numbers[split].append(self._next_number)
        self._next_number += 1
        if len(self._waiting[split]) == self._batch_rows:
            yield self._emit(split)

    def _emit(self, split: Split) -> RowBatch:
        batch = RowBatch(self._next_mark, split, tuple(self._waiting[split]), tuple(self._numbers[split]))
        self._next_mark += 1
        self._waiting[split], self._numbers[split] = [], []
        return batch
