"""One read for many runs: views of a store that hand out the same batch while they keep step."""

from __future__ import annotations

from collections.abc import Mapping

from clt.data.statistics import Statistics
from clt.data.stores import BaseActivationStore
from clt.types import ActivationBatch


class SharedRead:
    """A store and the batch that it read last."""

    def __init__(self, store: BaseActivationStore) -> None:
        self.store = store
        self.begin = store.state_dict()
        self.n_reads = 0
        self._at: dict[str, int] | None = None
        self._batch: ActivationBatch | None = None
        self._after: dict[str, int] = {}

    def batch_at(self, state: dict[str, int]) -> tuple[ActivationBatch, dict[str, int]]:
        """The batch that comes at a position, and the position after it."""
        if self._batch is None or state != self._at:
            if self.store.state_dict() != state:
                self.store.load_state_dict(state)
            self._batch, self._at, self._after = next(self.store), dict(state), self.store.state_dict()
            self.n_reads += 1
        return self._batch, self._after


class SharedView(BaseActivationStore):
    """A store with a position of its own over a shared read."""

    def __init__(self, shared: SharedRead) -> None:
        self._shared = shared
        self._state = shared.begin

    def __next__(self) -> ActivationBatch:
        batch, self._state = self._shared.batch_at(self._state)
        return batch

    @property
    def n_layers(self) -> int:
        return self._shared.store.n_layers

    @property
    def d_model(self) -> int:
        return self._shared.store.d_model

    @property
    def total_tokens(self) -> int | None:
        return self._shared.store.total_tokens

    @property
    def statistics(self) -> Statistics:
        return self._shared.store.statistics

    def state_dict(self) -> dict[str, int]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken; the store itself checks whether the state is its own."""
        before = self._shared.store.state_dict()
        self._shared.store.load_state_dict(state)
        self._shared.store.load_state_dict(before)
        self._state = dict(state)
