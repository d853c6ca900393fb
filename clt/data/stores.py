"""Stores: endless iterators of shuffled batches whose whole state is a few integers."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from clt.config.base import require_positive
from clt.data.client import ServerClient
from clt.data.metadata import Metadata
from clt.data.objects import ObjectSource, is_url
from clt.data.prefetch import ReadAhead
from clt.data.remote import RemoteSource
from clt.data.sampler import Runs, RunSampler, SamplingStrategy, one_run
from clt.data.sources import Rows, ShardSource, open_local
from clt.data.statistics import Statistics
from clt.errors import DatasetError
from clt.types import ActivationBatch


class BaseActivationStore(ABC):
    """An endless stream of `ActivationBatch`es."""

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    @abstractmethod
    def __next__(self) -> ActivationBatch:
        """The next batch; never raises StopIteration."""

    @property
    @abstractmethod
    def n_layers(self) -> int:
        """Layers per batch."""

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the host's residual stream."""

    @property
    @abstractmethod
    def total_tokens(self) -> int | None:
        """Tokens per epoch; None if the stream has no end."""

    @property
    @abstractmethod
    def statistics(self) -> Statistics:
        """Mean and spread of every dimension."""

    @abstractmethod
    def state_dict(self) -> dict[str, int]:
        """Where the stream is, as integers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on exactly where `state_dict` was taken."""


class ManifestActivationStore(BaseActivationStore):
    """A store over finished shards, wherever they are.

    Which rows come next is a pure function of (seed, epoch, step). Each epoch delivers every token exactly once, in a
    new order; batches are mixed across shards, and the last batch of an epoch is smaller unless `drop_last`.

    Args:
        source: where the rows are.
        batch_size_tokens: tokens per batch.
        seed: of the order.
        dtype: convert the activations; None: as stored (bfloat16 stays bfloat16).
        device: where the batches go.
        drop_last: leave out the remainder of an epoch (other tokens each epoch), so that all batches have one size.
        sampling_strategy: mixed, random_chunk or sequential; see `RunSampler`.
        run_tokens: neighbouring rows that stay together under `mixed`; 1 is a full shuffle.
        prefetch_batches: read so many batches ahead in the background; None: 2 on a GPU, else 0.
    """

    def __init__(
        self,
        source: ShardSource,
        *,
        batch_size_tokens: int = 4096,
        seed: int = 42,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        sampling_strategy: SamplingStrategy = "mixed",
        run_tokens: int = 16,
        prefetch_batches: int | None = None,
    ) -> None:
        require_positive(type(self).__name__, batch_size_tokens=batch_size_tokens, run_tokens=run_tokens)
        self.source = source
        self.batch_size_tokens = batch_size_tokens
        self.seed = seed
        self.dtype = dtype
        self.device = torch.device(device)
        self.drop_last = drop_last
        shard_tokens = [shard.tokens for shard in source.metadata.shards]
        self._sampler = RunSampler(shard_tokens, batch_size_tokens, seed, sampling_strategy, run_tokens)
        self._run_tokens = run_tokens
        self._sampling_strategy = sampling_strategy
        self._epoch = 0
        self._step = 0
        if prefetch_batches is None:
            prefetch_batches = 2 if self.device.type == "cuda" else 0
        self._ahead = ReadAhead(prefetch_batches)
        self.narrow: Callable[[Runs], Runs] | None = None
        """Takes the rows of a batch that are wanted here, where others read the rest; None: all are."""
        if drop_last and batch_size_tokens > self._sampler.total:
            raise DatasetError(
                f"The data set has {self._sampler.total:,} tokens, fewer than one batch of {batch_size_tokens:,}, and "
                "drop_last leaves out what does not fill a batch. Use a smaller batch or drop_last=False."
            )

    def __repr__(self) -> str:
        info, metadata = self.metadata.info, self.metadata
        size = f"{self.total_tokens:,} tokens x {self.n_layers} layers x {self.d_model}, {metadata.dtype}"
        place = f"batches of {self.batch_size_tokens:,}, epoch {self._epoch}, step {self._step}"
        return f"{type(self).__name__}({info.model_name}, {info.dataset}: {size}; {place})"

    @property
    def metadata(self) -> Metadata:
        """Who made the data set, from what, and how."""
        return self.source.metadata

    @property
    def n_layers(self) -> int:
        return self.metadata.info.num_layers

    @property
    def d_model(self) -> int:
        return self.metadata.info.d_model

    @property
    def total_tokens(self) -> int:
        return self.metadata.total_tokens

    @property
    def statistics(self) -> Statistics:
        return self.source.statistics()

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        if self.drop_last:
            return self.total_tokens // self.batch_size_tokens
        return self._sampler.steps_per_epoch

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __next__(self) -> ActivationBatch:
        rows = self._ahead.next(self._reads())
        self._epoch, self._step = self._after(self._epoch, self._step)
        return self._deliver(rows)

    def one_pass(self) -> Iterator[ActivationBatch]:
        """Every token once, in stored order; does not move the endless stream."""
        pending: list[np.ndarray] = []
        room = self.batch_size_tokens
        for shard, record in enumerate(self.metadata.shards):
            start = 0
            while start < record.tokens:
                stop = min(record.tokens, start + room)
                pending.append(one_run(shard, start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    yield self._deliver(self.source.read(np.concatenate(pending)))
                    pending, room = [], self.batch_size_tokens
        if pending:
            yield self._deliver(self.source.read(np.concatenate(pending)))

    def verify(self) -> None:
        """Check every shard against its checksum.

        Raises:
            DatasetError: naming each file that differs.
        """
        self.source.verify()

    def require_host(self, model_name: str, num_layers: int, d_model: int) -> None:
        """Refuse activations of another host.

        Raises:
            DatasetError: the shape or the name differs.
        """
        info = self.metadata.info
        found = (info.model_name, info.num_layers, info.d_model)
        if found != (model_name, num_layers, d_model):
            raise DatasetError(
                f"These activations are of {found[0]} ({found[1]} layers x {found[2]}), but {model_name} "
                f"({num_layers} layers x {d_model}) was asked for. Generate them from that model."
            )

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "step": self._step, **self._fixed()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            DatasetError: the state is of another data set, batch size or seed, whose order is another.
        """
        for name, value in self._fixed().items():
            if state.get(name) != value:
                raise DatasetError(
                    f"The saved position was taken with {name} = {state.get(name)}, but this store has {value}, so the "
                    "order of its rows is another one. Use the same data set and options, or start without the state."
                )
        self._epoch, self._step = int(state["epoch"]), int(state["step"])
        self._ahead.forget()

    def _after(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def _reads(self) -> Iterator[Callable[[], Rows]]:
        """The next reads in order, without end, beginning after those already begun."""
        epoch, step = self._epoch, self._step
        for _ in range(self._ahead.n_begun):
            epoch, step = self._after(epoch, step)
        while True:
            runs = self._sampler.batch(epoch, step)
            yield functools.partial(self.source.read, runs if self.narrow is None else self.narrow(runs))
            epoch, step = self._after(epoch, step)

    def _fixed(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size_tokens": self.batch_size_tokens,
            "total_tokens": self.total_tokens,
            "run_tokens": self._run_tokens,
            "sampling_strategy": get_args(SamplingStrategy).index(self._sampling_strategy),
            "steps_per_epoch": self.steps_per_epoch,
        }

    def _deliver(self, stored: Rows) -> ActivationBatch:
        rows = stored.rows
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(self.device, self.dtype, non_blocking=True)
        return ActivationBatch(
            inputs=rows[:, 0].transpose(0, 1),
            targets=rows[:, 1].transpose(0, 1),
            kind=stored.kind.to(self.device),
            sample=stored.sample.to(self.device),
            position=stored.position.to(self.device),
        )


class LocalActivationStore(ManifestActivationStore):
    """A store over a folder that `clt generate` wrote (or its parent, whose `train` part is then read).

    Batches are read through a memory map into memory that is used again once nobody holds the batch.

    Args:
        path: the folder, or a URL of an object store or web server (`s3://`, `gs://`, `az://`, `https://`, `file://`,
            `hf://datasets/OWNER/NAME[@revision]/folder`).
        options: see `ManifestActivationStore`.

    Raises:
        DatasetError: the folder is missing, unfinished or damaged.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        super().__init__(ObjectSource(str(path)) if is_url(path) else open_local(path), **options)


class RemoteActivationStore(ManifestActivationStore):
    """A store over a data set on an activation server, ours or crosslayer-coding's.

    Args:
        server_url: such as `http://127.0.0.1:8000`.
        dataset_id: `<model>/<corpus>_<split>`.
        token: None: from the environment variable CLT_SERVER_TOKEN.
        timeout_seconds: for each request.
        max_retries: how often a request is tried again.
        client: instead of all of the above.
        options: see `ManifestActivationStore`.

    Raises:
        DatasetError: no such data set, or no answer.
    """

    def __init__(
        self,
        server_url: str = "",
        dataset_id: str = "",
        *,
        token: str | None = None,
        timeout_seconds: float = 60.0,
        max_retries: int = 3,
        client: ServerClient | None = None,
        prefetch_batches: int | None = 4,
        **options: Any,
    ) -> None:
        client = client or ServerClient(
            server_url, dataset_id, token=token, timeout_seconds=timeout_seconds, attempts=max_retries + 1
        )
        super().__init__(RemoteSource(client), prefetch_batches=prefetch_batches, **options)
