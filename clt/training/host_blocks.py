"""Blocks of the host's memory on a device in turn: one arrives while another is worked on and a third goes back.

On a GPU the copies run beside the computation, on streams of their own, from and to pinned memory. On a CPU the same
copies are made, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from clt.training.memory import BLOCK_PLACES

_Any = TypeVar("_Any")


class _Place:
    """Memory on the device for one group of blocks."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, torch.dtype], Tensor] = {}
        self.arrived: Any = None
        """Event: what was sent for is here."""
        self.left: Any = None
        """Event: what was here is back, and the place is free."""

    def views(self, blocks: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
        """As large as these blocks."""
        return tuple(self._view((index, block.dtype), block.numel(), device) for index, block in enumerate(blocks))

    def _view(self, key: tuple[int, torch.dtype], size: int, device: torch.device) -> Tensor:
        if key not in self._memory or self._memory[key].numel() < size:
            self._memory[key] = torch.empty(size, dtype=key[1], device=device)
        return self._memory[key][:size]


class HostBlocks:
    """The places of one device."""

    def __init__(self, device: torch.device) -> None:
        """Make streams for a device that has any."""
        self._device = device
        self._places = [_Place() for _ in range(BLOCK_PLACES)]
        has_streams = device.type == "cuda"
        self._inward: Any = torch.cuda.Stream(device) if has_streams else None
        self._outward: Any = torch.cuda.Stream(device) if has_streams else None

    def through(self, items: Iterable[tuple[_Any, Sequence[Tensor]]]) -> Iterator[tuple[_Any, tuple[Tensor, ...]]]:
        """Give every item with its blocks on the device; what is changed there is changed on the host.

        Nothing else may use the blocks until all are through, when every one is back.
        """
        if self._inward is not None:
            self._inward.wait_stream(torch.cuda.current_stream(self._device))
        here = None
        for index, (item, blocks) in enumerate(items):
            place = self._places[index % len(self._places)]
            coming = item, blocks, place, self._send_for(blocks, place)
            if here is not None:
                yield from self._work_on(*here)
            here = coming
        if here is not None:
            yield from self._work_on(*here)
        if self._outward is not None:
            self._outward.synchronize()

    def _send_for(self, blocks: Sequence[Tensor], place: _Place) -> tuple[Tensor, ...]:
        with self._on(self._inward):
            if place.left is not None:
                self._inward.wait_event(place.left)
            views = place.views(blocks, self._device)
            for view, block in zip(views, blocks, strict=True):
                view.copy_(block, non_blocking=True)
            place.arrived = self._event(self._inward)
        return views

    def _work_on(
        self, item: _Any, blocks: Sequence[Tensor], place: _Place, views: tuple[Tensor, ...]
    ) -> Iterator[tuple[_Any, tuple[Tensor, ...]]]:
        if self._outward is not None:
            torch.cuda.current_stream(self._device).wait_event(place.arrived)
        yield item, views
        if self._outward is not None:
            # Before its stream becomes the current one, which would then wait for itself.
            self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with self._on(self._outward):
            for view, block in zip(views, blocks, strict=True):
                block.copy_(view, non_blocking=True)
            place.left = self._event(self._outward)

    def _on(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def _event(self, stream: Any) -> Any:
        return None if stream is None else stream.record_event()
