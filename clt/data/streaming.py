"""A store without a disk: a live source of batches, mixed in a buffer."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch

from clt.config.base import require_positive
from clt.data.statistics import RunningStatistics, Statistics
from clt.data.stores import BaseActivationStore
from clt.errors import TrainingError
from clt.types import ActivationBatch


class StreamingActivationStore(BaseActivationStore):
    """Batches made from activations as a host produces them; nothing is written.

    A buffer of `buffer_tokens` is kept full; each batch takes random tokens from it, whose places the next tokens
    fill. So neighbours of a text are spread over about buffer / batch steps. When the source ends it is begun again.

    The stream is a pure function of the source and the seed. Its position is the number of batches delivered:
    `load_state_dict` runs the source again up to there, which costs what it cost the first time.

    Args:
        make_source: begins the source of some epoch, such as `lambda epoch: (adapter.capture(x) for x in inputs)`.
        batch_size_tokens: tokens per batch.
        buffer_tokens: tokens mixed with each other; at least one batch.
        statistics_tokens: tokens from the beginning of the source from which `statistics` are measured.
        seed: of the mixing.
        dtype: of what is delivered; None: as the host gives it.
        device: where batches go; the buffer is there too.
    """

    def __init__(
        self,
        make_source: Callable[[int], Iterator[ActivationBatch]],
        *,
        batch_size_tokens: int = 4096,
        buffer_tokens: int = 65_536,
        statistics_tokens: int = 65_536,
        seed: int = 42,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        require_positive(type(self).__name__, batch_size_tokens=batch_size_tokens, statistics_tokens=statistics_tokens)
        self._make_source = make_source
        self.batch_size_tokens = batch_size_tokens
        self.buffer_tokens = max(buffer_tokens, batch_size_tokens)
        self._statistics_tokens = statistics_tokens
        self.seed = seed
        self.dtype = dtype
        self.device = torch.device(device)
        self._statistics: Statistics | None = None
        first = next(make_source(0), None)
        if first is None:
            raise TrainingError("The source of the stream gave no activations at all. Is its corpus empty?")
        self._shape = (first.n_layers, first.d_model)
        self._begin()

    @property
    def n_layers(self) -> int:
        return self._shape[0]

    @property
    def d_model(self) -> int:
        return self._shape[1]

    @property
    def total_tokens(self) -> None:
        return None

    @property
    def statistics(self) -> Statistics:
        """Mean and spread of the first tokens of the source, captured once for this purpose."""
        if self._statistics is None:
            running = RunningStatistics(*self._shape)
            for batch in self._make_source(0):
                rows = batch.inputs.new_empty(batch.n_tokens, 2, *self._shape)
                rows[:, 0], rows[:, 1] = batch.inputs.transpose(0, 1), batch.targets.transpose(0, 1)
                running.update(rows.cpu())
                if running.count >= self._statistics_tokens:
                    break
            self._statistics = running.result()
        return self._statistics

    def __next__(self) -> ActivationBatch:
        self._fill()
        chosen = torch.randperm(self._buffer.n_tokens, generator=self._rng)[: self.batch_size_tokens]
        keep = torch.ones(self._buffer.n_tokens, dtype=torch.bool)
        keep[chosen] = False
        batch = self._buffer.select(chosen.to(self.device))
        self._buffer = self._buffer.select(keep.to(self.device))
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {
            "step": self._step,
            "seed": self.seed,
            "batch_size_tokens": self.batch_size_tokens,
            "buffer_tokens": self.buffer_tokens,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on exactly where `state_dict` was taken, by running the source again up to there.

        Raises:
            TrainingError: the state was taken with another seed, batch or buffer.
        """
        for name, value in self.state_dict().items():
            if name != "step" and state.get(name) != value:
                raise TrainingError(
                    f"The saved position was taken with {name} = {state.get(name)}, but this stream has {value}. "
                    "Use the same options, or start without the state."
                )
        self._begin()
        for _ in islice(self, int(state["step"])):
            pass

    def _begin(self) -> None:
        self._rng = torch.Generator().manual_seed(self.seed)
        self._step = 0
        self._epoch = 0
        self._source = self._make_source(0)
        self._buffer = self._next_from_source()

    def _fill(self) -> None:
        parts = [self._buffer]
        n_tokens = self._buffer.n_tokens
        while n_tokens < self.buffer_tokens:
            parts.append(self._next_from_source())
            n_tokens += parts[-1].n_tokens
        if len(parts) > 1:
            self._buffer = _joined(parts)

    def _next_from_source(self) -> ActivationBatch:
        batch = next(self._source, None)
        if batch is None:
            self._epoch += 1
            self._source = self._make_source(self._epoch)
            batch = next(self._source, None)
        if batch is None:
            raise TrainingError(f"The source of the stream gave nothing in epoch {self._epoch}.")
        return batch.to(self.device, self.dtype)


def _joined(parts: list[ActivationBatch]) -> ActivationBatch:
    return ActivationBatch(
        inputs=torch.cat([part.inputs for part in parts], dim=1),
        targets=torch.cat([part.targets for part in parts], dim=1),
        kind=torch.cat([part.kind for part in parts]),
        sample=torch.cat([part.sample for part in parts]),
        position=torch.cat([part.position for part in parts]),
    )
