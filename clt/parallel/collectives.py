"""What ranks tell each other: a few operations on a group, each counted, each with an error that names the group."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from clt.errors import CLTError, ParallelError

_Any = TypeVar("_Any")


@dataclass
class Traffic:
    """How many bytes this rank put into collectives, by what they were for.

    A sum counts the tensor once, a gather what this rank sends, a broadcast the tensor at its sender. (What a backend
    moves for it differs: a ring sends a summed tensor 2 (n - 1) / n times.)
    """

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def add(self, purpose: str, tensor: Tensor) -> None:
        """Count one operation."""
        self.bytes[purpose] += tensor.numel() * tensor.element_size()
        self.calls[purpose] += 1

    def reset(self) -> None:
        """Begin again at 0."""
        self.bytes.clear()
        self.calls.clear()


class Group:
    """Some ranks that talk to each other. In a group of one everything is the identity and nothing is sent."""

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        rank: int,
        process_group: dist.ProcessGroup | None,
        traffic: Traffic,
        timeout_seconds: float = 0.0,
    ) -> None:
        """Describe a group that `open_mesh` made.

        Args:
            name: of the axis, for errors: world, dp, tp.
            ranks: of its members, in the world.
            rank: this process's, in the world; one of them.
            process_group: torch's; None where there is only one member.
            traffic: counts for the whole process.
            timeout_seconds: after which an operation is given up, for errors.
        """
        self.name, self.ranks, self.traffic = name, tuple(ranks), traffic
        self.rank = self.ranks.index(rank)
        """This process's place in the group."""
        self.size = len(self.ranks)
        self._group, self._timeout = process_group, timeout_seconds

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.size == 1

    def sum_(self, tensor: Shaped[Tensor, "*any"], purpose: str) -> Shaped[Tensor, "*any"]:
        """Replace a contiguous tensor by its sum over the group; every rank ends with the same bits."""
        if not self.is_alone and tensor.numel():
            with self._asks(purpose, tensor):
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, tensor: Shaped[Tensor, "*any"], purpose: str) -> Shaped[Tensor, "*rank_and_any"]:
        """Everybody's tensor, all of one shape, by rank in the group."""
        if self.is_alone:
            return tensor[None]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in self.ranks]
        with self._asks(purpose, tensor):
            dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.stack(parts)

    def gather_into(self, parts: Sequence[Tensor], purpose: str) -> None:
        """Fill contiguous `parts[i]`, of any shapes, with the i-th rank's own; this rank's is its own already."""
        if self.is_alone:
            return
        for index, part in enumerate(parts):
            self.broadcast_(part, purpose, index)

    def broadcast_(self, tensor: Shaped[Tensor, "*any"], purpose: str, source: int = 0) -> Shaped[Tensor, "*any"]:
        """Replace a contiguous tensor by that of one rank of the group."""
        if not self.is_alone and tensor.numel():
            with self._asks(purpose, tensor if self.rank == source else tensor[:0]):
                dist.broadcast(tensor, self.ranks[source], group=self._group)
        return tensor

    def tell(self, value: _Any, purpose: str, source: int = 0) -> _Any:
        """A small Python value of one rank, for all."""
        if self.is_alone:
            return value
        box: list[Any] = [value]
        with self._guards(purpose):
            dist.broadcast_object_list(box, self.ranks[source], group=self._group)
        return box[0]

    def collect(self, value: _Any, purpose: str) -> list[_Any]:
        """Everybody's small Python value, by rank in the group."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.size
        with self._guards(purpose):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def bring(self, value: _Any, purpose: str) -> list[_Any]:
        """Everybody's Python value, by rank, at the group's first rank; nothing at the others."""
        if self.is_alone:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._guards(purpose):
            dist.gather_object(value, values, self.ranks[0], group=self._group)
        return values or []

    def largest(self, number: int, purpose: str, device: torch.device | str = "cpu") -> int:
        """The largest whole number of the group's; the same answer everywhere."""
        if self.is_alone:
            return number
        box = torch.tensor([number], device=device)
        with self._asks(purpose, box):
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group)
        return int(box)

    def any(self, flag: bool, purpose: str, device: torch.device | str = "cpu") -> bool:
        """Whether it is true of one rank at least; the same answer everywhere."""
        return bool(self.largest(int(flag), purpose, device))

    def total(self, number: int, purpose: str, device: torch.device | str = "cpu") -> int:
        """Sum of a whole number over the group."""
        return number if self.is_alone else int(self.sum_(torch.tensor([number], device=device), purpose))

    def wait(self, purpose: str) -> None:
        """Go on when everybody is here."""
        if not self.is_alone:
            with self._guards(purpose):
                dist.barrier(group=self._group)

    @contextmanager
    def _asks(self, purpose: str, tensor: Tensor) -> Iterator[None]:
        self.traffic.add(purpose, tensor)
        with self._guards(purpose):
            yield

    @contextmanager
    def _guards(self, purpose: str) -> Iterator[None]:
        """Name what failed; a backend's own message speaks of sockets."""
        begin = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise ParallelError(
                f"Rank {self.ranks[self.rank]} lost its peers, {self._others()} of group {self.name}, while waiting "
                f"{time.monotonic() - begin:.1f} s for {purpose} (timeout {self._timeout:g} s): "
                f"{str(error).splitlines()[0]}\n"
                "One of them died, hangs, or the network between the machines is down; its own output says more. "
                "Started again (torchrun does it with --max-restarts N), the run goes on from its last checkpoint. "
                "If ranks are only slow, raise --timeout-seconds."
            ) from error

    def _others(self) -> str:
        return "rank " + ", ".join(str(rank) for place, rank in enumerate(self.ranks) if place != self.rank)


def first_difference(
    group: Group, values: Mapping[str, Any], purpose: str
) -> tuple[int, dict[str, tuple[Any, Any]]] | None:
    """The first rank whose values are not rank 0's, and by name what rank 0 has and what it has; None: all agree."""
    first, *others = group.collect(dict(values), purpose)
    for rank, other in enumerate(others, start=1):
        if other != first:
            names = [*first, *(name for name in other if name not in first)]
            return rank, {n: (first.get(n), other.get(n)) for n in names if first.get(n) != other.get(n)}
    return None


def agreed(group: Group, work: Callable[[], _Any], purpose: str) -> _Any:
    """Let the group's first rank do something and tell the others what came out, also if it failed.

    Raises:
        CLTError: what `work` raised, on every rank.
    """
    value: Any = None
    failure: CLTError | None = None
    if group.rank == 0:
        try:
            value = work()
        except CLTError as error:  # told to all below, and raised there
            failure = error
    value, failure = group.tell((value, failure), purpose)
    if failure is not None:
        raise failure
    return value
