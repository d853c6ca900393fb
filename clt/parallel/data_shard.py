"""Which rows of a batch are whose: copies of the dictionary (dp) see different tokens, its parts (tp) the same ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from clt.data.sampler import Runs
from clt.data.statistics import Statistics
from clt.data.stores import BaseActivationStore, ManifestActivationStore
from clt.errors import ConfigError
from clt.models.slices import part_of
from clt.parallel.collectives import Group
from clt.parallel.mesh import Mesh
from clt.types import ActivationBatch


def micro_parts(n_tokens: int, micro: int | None, part: int, n_parts: int) -> list[range]:
    """One copy's rows of a batch: its part of each micro-batch, as ranges of rows of the whole batch."""
    size = micro or n_tokens
    parts = []
    for start in range(0, n_tokens, size):
        rows = part_of(min(size, n_tokens - start), part, n_parts)
        parts.append(range(start + rows.start, start + rows.stop))
    return parts


# The types in which activations travel; ranks that did not read learn which from its place here.
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def divided(
    store: BaseActivationStore, mesh: Mesh, micro_batch_tokens: int | None, one_reader: bool
) -> BaseActivationStore:
    """A store of whole batches as this rank sees it.

    Args:
        store: opened alike on every rank.
        mesh: this rank's place.
        micro_batch_tokens: see `micro_parts`.
        one_reader: one rank of each machine reads for all parts there.
    """
    if not mesh.dp.is_alone:
        store = PartStore(store, mesh, micro_batch_tokens)
    return SharedReader(store, mesh.near, mesh.device) if one_reader and not mesh.near.is_alone else store


class _Over(BaseActivationStore):
    """A store over another, which keeps the position; it is the same for any number of ranks."""

    def __init__(self, store: BaseActivationStore) -> None:
        self._store = store

    @property
    def n_layers(self) -> int:
        return self._store.n_layers

    @property
    def d_model(self) -> int:
        return self._store.d_model

    @property
    def total_tokens(self) -> int | None:
        return self._store.total_tokens

    @property
    def statistics(self) -> Statistics:
        return self._store.statistics

    def state_dict(self) -> dict[str, int]:
        return self._store.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._store.load_state_dict(state)


class PartStore(_Over):
    """A store of which every copy of the dictionary gets its own rows, and all copies together every row once.

    From data sets at rest only those rows are read. Its position is the underlying store's.
    """

    def __init__(self, store: BaseActivationStore, mesh: Mesh, micro_batch_tokens: int | None) -> None:
        """Divide a store among the copies.

        Raises:
            ConfigError: some (micro-)batch would have fewer tokens than there are copies.
        """
        super().__init__(store)
        self._mesh, self._micro = mesh, micro_batch_tokens
        self._reads_parts = isinstance(store, ManifestActivationStore)
        if isinstance(store, ManifestActivationStore):
            _require_enough(store, micro_batch_tokens, mesh.dp.size)
            store.narrow = self._narrow

    def _parts(self, n_tokens: int) -> list[range]:
        return micro_parts(n_tokens, self._micro, self._mesh.dp.rank, self._mesh.dp.size)

    def _narrow(self, runs: Runs) -> Runs:
        """This copy's part of a batch's runs."""
        ends = np.cumsum(runs[:, 2] - runs[:, 1])
        return np.concatenate([_between(runs, ends, rows) for rows in self._parts(int(ends[-1]))])

    def __next__(self) -> ActivationBatch:
        batch = next(self._store)
        if self._reads_parts:
            return batch
        rows = [torch.arange(part.start, part.stop) for part in self._parts(batch.n_tokens)]
        return batch.select(torch.cat(rows).to(batch.inputs.device))


def _between(runs: Runs, ends: np.ndarray, rows: range) -> Runs:
    """The runs that hold rows `rows` of those that `runs` hold, one after the other."""
    starts = ends - (runs[:, 2] - runs[:, 1])
    begin, end = np.maximum(starts, rows.start), np.minimum(ends, rows.stop)
    inside = begin < end
    first = runs[:, 1] + (begin - starts)
    return np.stack([runs[:, 0], first, first + (end - begin)], axis=1)[inside]


def _require_enough(store: ManifestActivationStore, micro: int | None, copies: int) -> None:
    last = 0 if store.drop_last else store.total_tokens % store.batch_size_tokens
    for size in (store.batch_size_tokens, last):
        rest = size % (micro or store.batch_size_tokens) or min(micro or size, size)
        if 0 < rest < copies:
            raise ConfigError(
                f"--dp {copies} cannot divide a batch of {rest} tokens, which is what {store.total_tokens:,} tokens in "
                f"batches of {store.batch_size_tokens:,} and micro-batches of {micro or size:,} leave at the end. Use "
                "another train_batch_size_tokens or micro_batch_tokens, or fewer copies."
            )


class SharedReader(_Over):
    """One rank reads, the others of its group are sent what it read.

    For parts of a dictionary on one machine, which all need the same rows: each row is read and decoded once. Only the
    rank that reads knows the position, so only it may be asked for `state_dict`.
    """

    def __init__(self, store: BaseActivationStore, group: Group, device: torch.device) -> None:
        """Let the first rank of a group read for all of it.

        Args:
            store: open on every rank, read on the first.
            group: ranks that need the same rows.
            device: where batches go.
        """
        super().__init__(store)
        self._group, self._device = group, device

    def __next__(self) -> ActivationBatch:
        if self._group.rank == 0:
            batch = next(self._store).to(self._device)
            sizes = torch.tensor([batch.n_tokens, _TYPES.index(batch.inputs.dtype)], device=self._device)
            self._group.broadcast_(sizes, "batch")
            self._send(batch)
            return batch
        sizes = torch.zeros(2, dtype=torch.int64, device=self._device)
        n_tokens, dtype = self._group.broadcast_(sizes, "batch").tolist()
        shape = self.n_layers, n_tokens, self.d_model
        batch = ActivationBatch(
            inputs=torch.empty(shape, dtype=_TYPES[dtype], device=self._device),
            targets=torch.empty(shape, dtype=_TYPES[dtype], device=self._device),
            kind=torch.empty(n_tokens, dtype=torch.uint8, device=self._device),
            sample=torch.empty(n_tokens, dtype=torch.int64, device=self._device),
            position=torch.empty(n_tokens, dtype=torch.int64, device=self._device),
        )
        self._send(batch)
        return batch

    def _send(self, batch: ActivationBatch) -> None:
        for name in ("inputs", "targets", "kind", "sample", "position"):
            tensor = getattr(batch, name)
            wide = tensor.long() if name in ("sample", "position") else tensor
            self._group.broadcast_(wide.contiguous(), "batch")
