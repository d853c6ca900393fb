"""Which rows come next, as a pure function of (seed, epoch, step).

The rows of a data set are cut into *runs* of neighbours (rows are shuffled when written, so neighbours are strangers).
Each epoch puts the runs into a new order; a batch is the next so many rows of that order, and may begin or end inside
a run. Only the order of the present epoch is kept: a few bytes per run, made again from (seed, epoch) when needed.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int64

SamplingStrategy = Literal["mixed", "random_chunk", "sequential"]


Runs = Int64[np.ndarray, "run 3"]
"""Runs of neighbouring rows: shard, first row, row after the last."""


def one_run(shard: int, start: int, stop: int) -> Runs:
    """Rows `start` to `stop` (not included) of one shard."""
    return np.array([[shard, start, stop]], dtype=np.int64)


def rows_of_runs(runs: Runs) -> Int64[np.ndarray, " token"]:
    """The numbers of all rows, one run after the other."""
    lengths = runs[:, 2] - runs[:, 1]
    before = np.cumsum(lengths) - lengths
    return np.repeat(runs[:, 1] - before, lengths) + np.arange(lengths.sum())


class RunSampler:
    """Delivers every row exactly once per epoch, in batches.

    Args:
        shard_tokens: rows of each shard.
        batch_size: rows per batch; the last batch of an epoch may be smaller.
        seed: of all epochs' orders.
        strategy: mixed: short runs from all shards; random_chunk: one run per batch, so that a batch mostly comes from
            one shard; sequential: shards in random order, each read from its beginning to its end.
        run_tokens: length of a run of `mixed`.
    """

    def __init__(
        self,
        shard_tokens: list[int],
        batch_size: int,
        seed: int,
        strategy: SamplingStrategy = "mixed",
        run_tokens: int = 16,
    ) -> None:
        self.total = sum(shard_tokens)
        self.batch_size = batch_size
        self.seed = seed
        lengths = {"mixed": run_tokens, "random_chunk": batch_size, "sequential": max(shard_tokens)}
        self._runs = _cut(shard_tokens, lengths[strategy])
        self._epoch: int | None = None
        self._order = np.zeros(0, np.int64)
        self._ends = np.zeros(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every row once."""
        return -(-self.total // self.batch_size)

    def batch(self, epoch: int, step: int) -> Runs:
        """The runs that make up batch `step` of `epoch`, by shard and row, so that they are read in one sweep."""
        self._prepare(epoch)
        first, last = step * self.batch_size, min((step + 1) * self.batch_size, self.total)
        begin = int(np.searchsorted(self._ends, first, side="right"))
        end = int(np.searchsorted(self._ends, last, side="left")) + 1
        runs = self._runs[self._order[begin:end]]
        runs[-1, 2] -= int(self._ends[end - 1]) - last
        head = int(self._ends[begin - 1]) if begin else 0
        runs[0, 1] += first - head
        return runs[np.lexsort((runs[:, 1], runs[:, 0]))]

    def _prepare(self, epoch: int) -> None:
        if self._epoch != epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self._runs))
            self._ends = np.cumsum((self._runs[:, 2] - self._runs[:, 1])[self._order])
            self._epoch = epoch


def _cut(shard_tokens: list[int], length: int) -> Runs:
    parts = []
    for shard, tokens in enumerate(shard_tokens):
        starts = np.arange(0, tokens, length, dtype=np.int64)
        parts.append(np.stack([np.full_like(starts, shard), starts, np.minimum(starts + length, tokens)], axis=1))
    return np.concatenate(parts)
