"""Writes activations to shards: shuffled, checksummed, each file whole or absent, resumable after every shard."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clt.data.codecs import Codec
from clt.data.files import refusing_a_full_disk, write_file
from clt.data.metadata import (
    INDEX_FILE,
    METADATA_FILE,
    PROGRESS_FILE,
    STATISTICS_FILE,
    DatasetInfo,
    Metadata,
    ShardRecord,
    index_bytes,
    library_versions,
    now,
)
from clt.data.progress import Progress, load_progress, require_same_plan, save_progress
from clt.data.quantise import QuantisationError, dequantise, quantise
from clt.data.rows import DTYPES, Columns, RowFileWriter, RowLayout, rows_of
from clt.data.statistics import SIDES, RunningStatistics, statistics_to_json
from clt.errors import ConfigError, DatasetError
from clt.types import ActivationBatch, TokenKind

STATISTICS_BYTES = 2**22
"""Of the float64 copy that is summed up at once: about what stays in a processor's cache."""


class ActivationWriter:
    """Takes batches in order and leaves a folder that a store can open.

    `metadata.json` is written last: a folder without it is unfinished. A later writer with `resume=True` and the
    same arguments goes on from the last finished shard: give it the same batches again, numbered by `mark` (you may
    leave out those before `resume_mark`), and it drops the tokens it already has.

    Args:
        folder: made if missing; must not hold a finished data set.
        info: the host, the corpus and the shape of what will be appended.
        dtype: type on disk: bfloat16, float16, float32, or int8 (measures and records its own error).
        shard_tokens: tokens per file; a row is shuffled within its file.
        seed: of the shuffle.
        codec: the format of the files.
        resume: go on with an unfinished folder instead of starting it anew.
        on_shard: called with each shard once it is finished and will not be written again.
        part: number of this part of a data set that several writers share; another order of the rows in each. Such a
            folder ends with `finish_part`, see clt/data/parts.py.

    Raises:
        DatasetError: the folder is finished, was begun with other arguments, or the disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        info: DatasetInfo,
        *,
        dtype: str = "bfloat16",
        shard_tokens: int = 262_144,
        seed: int = 42,
        codec: Codec | None = None,
        resume: bool = False,
        on_shard: Callable[[ShardRecord], None] | None = None,
        part: int | None = None,
    ) -> None:
        self._part = part
        self.codec = codec or Codec()
        _check_dtype(dtype, self.codec)
        self.folder = Path(folder)
        self._on_shard = on_shard
        self.info = info
        self.layout = RowLayout(info.num_layers, info.d_model, dtype)
        self.shard_tokens = shard_tokens
        self.seed = seed
        if (self.folder / METADATA_FILE).exists():
            raise DatasetError(f"{self.folder} already holds a finished data set. Delete it or choose another folder.")
        with refusing_a_full_disk(self.folder, 4096):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._statistics = RunningStatistics(info.num_layers, info.d_model)
        self._progress = self._begin(resume)
        self._next_mark = self._progress.mark
        self._error = QuantisationError(info.num_layers, self._progress.codec) if dtype == "int8" else None
        self._file: RowFileWriter | None = None

    @property
    def resume_mark(self) -> int:
        """Number of the first batch that is still needed; 0 for a new data set."""
        return self._progress.mark

    @property
    def finished_shards(self) -> tuple[ShardRecord, ...]:
        """The shards that will not be written again."""
        return self._progress.shards

    @property
    def total_tokens(self) -> int:
        """Tokens written so far, finished shards and the present one together."""
        finished = sum(shard.tokens for shard in self._progress.shards)
        return finished + (self._file.tokens if self._file else 0)

    def append(self, batch: ActivationBatch, *, mark: int | None = None) -> None:
        """Add the tokens of a batch.

        Args:
            batch: activations on any device, in any floating type.
            mark: number of the batch in the stream; None: one more than the last.

        Raises:
            DatasetError: another shape than announced, a value that is not finite, or a full disk.
        """
        mark = self._next_mark if mark is None else mark
        self._next_mark = mark + 1
        start = self._already_there(mark, batch.n_tokens)
        if start >= batch.n_tokens:
            return
        self._check_shape(batch)
        scratch_dtype = torch.float32 if self._error else self.layout.torch_dtype
        rows = rows_of(batch.inputs, batch.targets, scratch_dtype)
        columns = _columns_of(batch)
        while start < batch.n_tokens:
            file = self._open_file()
            stop = min(batch.n_tokens, start + file.room)
            self._put(file, rows[start:stop], {name: column[start:stop] for name, column in columns.items()})
            if file.room == 0:
                self._finish_shard(mark, stop)
            start = stop

    def close(self) -> None:
        """Finish the last shard, then write statistics, index and metadata; does nothing if that was done.

        Raises:
            DatasetError: nothing was appended, or the disk is full.
        """
        if (self.folder / METADATA_FILE).exists():
            return
        if self._file is not None:
            self._finish_shard(self._next_mark, 0)
        if not self._progress.shards:
            raise DatasetError(f"{self.folder} got no tokens, so there is no data set to finish.")
        write_file(self.folder / STATISTICS_FILE, statistics_to_json(self._statistics.result()).encode())
        write_file(self.folder / INDEX_FILE, index_bytes(self._progress.shards))
        self._metadata().write(self.folder)
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)

    def finish_part(self) -> None:
        """Finish the last shard and keep the state beside the shards; the parts' states then make one data set."""
        if self._file is not None:
            self._finish_shard(self._next_mark, 0)

    def abandon(self) -> None:
        """Leave the folder unfinished: finished shards stay for a later writer, the present one is dropped."""
        if self._file is not None:
            self._file.close()
            self._file.path.unlink(missing_ok=True)
            self._file = None

    def __enter__(self) -> "ActivationWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._part is None:
            self.close()
        elif kind is None:
            self.finish_part()
        else:
            self.abandon()

    def _plan(self) -> dict[str, Any]:
        plan = dataclasses.asdict(self.info)
        plan.update(dtype=self.layout.dtype, shard_tokens=self.shard_tokens, seed=self.seed)
        plan.update(dataclasses.asdict(self.codec))
        return json.loads(json.dumps(plan))

    def _begin(self, resume: bool) -> Progress:
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        saved = load_progress(self.folder, self._statistics) if resume else None
        if saved is not None:
            require_same_plan(self.folder, saved.plan, self._plan())
            return saved
        self._drop_old_shards()
        self._statistics = RunningStatistics(self.info.num_layers, self.info.d_model)
        progress = Progress(plan=self._plan())
        save_progress(self.folder, progress, self._statistics)
        return progress

    def _drop_old_shards(self) -> None:
        shards = sorted(self.folder.glob(self.codec.pattern))
        if shards and not (self.folder / PROGRESS_FILE).exists():
            raise DatasetError(
                f"{self.folder} holds {len(shards)} shards, no {METADATA_FILE} and no {PROGRESS_FILE}: they may "
                "be all that is left of a data set.\nDelete the folder yourself, or choose another one."
            )
        for shard in shards:
            shard.unlink()

    def _already_there(self, mark: int, n_tokens: int) -> int:
        if mark < self._progress.mark:
            return n_tokens
        return self._progress.offset if mark == self._progress.mark else 0

    def _check_shape(self, batch: ActivationBatch) -> None:
        expected = (self.info.num_layers, self.info.d_model)
        if (batch.n_layers, batch.d_model) != expected:
            raise DatasetError(
                f"A batch of {batch.n_layers} layers x {batch.d_model} was appended to {self.folder}, which is for "
                f"{expected[0]} x {expected[1]} ({self.info.model_name})."
            )

    def _open_file(self) -> RowFileWriter:
        if self._file is None:
            number = len(self._progress.shards)
            path = self.folder / f".shard_{number:05d}.tmp"
            order = (self.seed, number) if self._part is None else (self.seed, self._part, number)
            self._file = RowFileWriter(path, self.layout, self.shard_tokens, order)
        return self._file

    def _put(self, file: RowFileWriter, rows: Float[Tensor, "token side layer d_model"], columns: Columns) -> None:
        block = max(16, STATISTICS_BYTES // (8 * rows[0].numel()))
        for start in range(0, rows.shape[0], block):
            part = slice(start, start + block)
            self._put_part(file, rows[part], {name: column[part] for name, column in columns.items()})
        counts = np.bincount(columns["kind"], minlength=len(TokenKind))
        kinds = tuple(int(old + new) for old, new in zip(self._progress.kinds, counts, strict=True))
        self._progress = dataclasses.replace(self._progress, kinds=kinds)

    def _put_part(self, file: RowFileWriter, rows: Float[Tensor, "token side layer d_model"], columns: Columns) -> None:
        stored, values = rows, rows
        if self._error is not None:
            stored, scale = quantise(rows)
            values = dequantise(stored, scale, self.layout.value_dtype)
            self._error.update(rows, values)
            columns = {**columns, "scale": scale.numpy()}
        self._statistics.update(values)
        if not self._statistics.mean.isfinite().all():
            self.abandon()
            raise DatasetError(_describe_bad_value(rows, columns, self.layout.dtype))
        with refusing_a_full_disk(self.folder, self.layout.file_bytes(self.shard_tokens)):
            file.put(stored, columns)

    def _finish_shard(self, mark: int, offset: int) -> None:
        file = self._open_file()
        with refusing_a_full_disk(self.folder, self.layout.file_bytes(file.tokens)):
            file.finish()
            record = self.codec.seal(file.path, self.layout, file.tokens, len(self._progress.shards))
        self._file = None
        self._progress = dataclasses.replace(
            self._progress,
            shards=(*self._progress.shards, record),
            mark=mark,
            offset=offset,
            codec=self._error.state() if self._error else {},
        )
        save_progress(self.folder, self._progress, self._statistics)
        if self._on_shard is not None:
            self._on_shard(record)

    def _metadata(self) -> Metadata:
        progress = self._progress
        return Metadata(
            info=self.info,
            format=self.codec.format_name,
            dtype=self.layout.dtype,
            total_tokens=sum(shard.tokens for shard in progress.shards),
            shard_tokens=self.shard_tokens,
            shards=progress.shards,
            seed=self.seed,
            kinds={kind.name.lower(): progress.kinds[kind] for kind in TokenKind},
            codec={**self.codec.describe(), **(self._error.report() if self._error else {})},
            versions=library_versions(),
            created=now(),
        )


def _check_dtype(dtype: str, codec: Codec) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not one of {', '.join(map(repr, DTYPES))}.")
    if dtype == "int8" and codec.output_format == "hdf5":
        raise ConfigError("dtype = 'int8' needs output_format = 'safetensors'; the seeds' HDF5 layout has no scales.")


def _columns_of(batch: ActivationBatch) -> Columns:
    return {
        "sample": batch.sample.cpu().numpy().astype(np.int64),
        "position": batch.position.cpu().numpy().astype(np.int32),
        "kind": batch.kind.cpu().numpy(),
    }


def _describe_bad_value(rows: Float[Tensor, "token side layer d_model"], columns: Columns, dtype: str) -> str:
    bad = torch.nonzero(~rows.isfinite())
    if not len(bad):
        return "The statistics overflowed although every value is finite: the activations are beyond 1e150."
    token, side, layer, dimension = bad[0].tolist()
    return (
        f"Layer {layer} has {rows[token, side, layer, dimension].item()} in its {SIDES[side]} (dimension {dimension}) "
        f"at position {columns['position'][token]} of sample {columns['sample'][token]}, as {dtype}.\n"
        "Either the host computes values that are not finite, or they are too large for the type on disk "
        "(float16 ends at 65,504): use bfloat16 or float32."
    )
