"""The ranks of a run as a table: rows are copies of the dictionary (dp), columns are parts of it (tp).

`torchrun` starts the processes and tells each its rank; `open_mesh` makes of them PyTorch's process groups and
DeviceMesh. Without torchrun there is a mesh of one rank, on which every operation is the identity: callers need not ask
whether they are alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from clt.errors import ConfigError, ParallelError
from clt.parallel.collectives import Group, Traffic
from clt.types import choose_device

# Longest wait for a peer, unless the caller says otherwise: a step is far shorter, a checkpoint seldom longer.
TIMEOUT_SECONDS = 600.0
PATIENCE_SECONDS = 7 * 24 * 3600.0
"""For work whose ranks meet seldom, and where one that goes on after a kill may come hours after the others. torchrun
ends all of them when one dies, so nobody waits for the dead."""
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Mesh:
    """Who this process is, and the groups it belongs to."""

    world: Group
    """Every rank."""
    dp: Group
    """The ranks with the same features as this one, each with other tokens."""
    tp: Group
    """The ranks with the same tokens as this one, each with other features."""
    near: Group
    """Those of `tp` that are on this rank's machine."""
    device: torch.device
    """Where this rank computes."""
    local_rank: int = 0
    """This rank's number on its machine."""
    local_size: int = 1
    """How many ranks there are on its machine."""
    device_mesh: DeviceMesh | None = None
    """PyTorch's, with axes dp and tp; None where there is only one rank."""

    @property
    def rank(self) -> int:
        """This process's number among all."""
        return self.world.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.world.size

    @property
    def is_alone(self) -> bool:
        """Whether this is the only rank."""
        return self.world.is_alone

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints, logs and writes what exists once."""
        return self.world.rank == 0

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent."""
        return self.world.traffic

    def barrier(self, purpose: str = "everybody") -> None:
        """Go on when every rank is here."""
        self.world.wait(purpose)


def is_launched() -> bool:
    """Whether torchrun (or something that sets the same variables) started this process as one of several ranks."""
    return all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def own_device(mesh: Mesh, device: str | None) -> str | None:
    """Where a rank that talks over the network computes: the GPUs of its machine in turn, unless a device is given."""
    if device is None and not mesh.is_alone and torch.cuda.is_available():
        return f"cuda:{mesh.local_rank % torch.cuda.device_count()}"
    return device


def mesh_of_one(device: torch.device | str | None = None) -> Mesh:
    """A single rank."""
    traffic = Traffic()
    groups = [Group(name, [0], 0, None, traffic) for name in ("world", "dp", "tp", "near")]
    return Mesh(*groups, device=choose_device(device))


def shape_of(world: int, tp: int | None, dp: int | None) -> tuple[int, int]:
    """Copies and parts of the dictionary; what is not given follows, and with nothing given all ranks are parts.

    Raises:
        ConfigError: they do not multiply to the number of ranks.
    """
    if tp is None:
        tp = world if dp is None else max(world // max(dp, 1), 1)
    if dp is None:
        dp = max(world // max(tp, 1), 1)
    if tp < 1 or dp < 1 or dp * tp != world:
        raise ConfigError(
            f"--dp {dp} times --tp {tp} is {dp * tp}, but there are {world} ranks. Start {dp * tp} of them (torchrun "
            f"--nproc-per-node {dp * tp} on one machine), or give a --tp or --dp that divides {world}."
        )
    return dp, tp


@contextmanager
def open_mesh(
    tp: int | None = None,
    dp: int | None = None,
    device: torch.device | str | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Iterator[Mesh]:
    """The mesh of the ranks that torchrun started, or of this process alone; closed on leaving.

    Args:
        tp: parts of the dictionary; None: world / dp.
        dp: copies of it; None: world / tp. With neither, every rank is a part.
        device: where ranks compute; None: each its own GPU if there are any, else the CPU.
        timeout_seconds: longest wait for another rank in any operation.

    Raises:
        ConfigError: tp and dp do not fit the number of ranks, or a machine has fewer GPUs than ranks.
        ParallelError: not all ranks appear within the timeout.
    """
    if not is_launched():
        shape_of(1, tp, dp)
        yield mesh_of_one(device)
        return
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    shape, where = shape_of(world, tp, dp), _device_of(local, device)
    _connect(where, rank, world, timeout_seconds)
    try:
        mesh = _mesh(shape, where, timeout_seconds)
        yield mesh
        mesh.barrier("the end")  # nobody leaves, taking the meeting place along, while another still writes or reads
    finally:
        dist.destroy_process_group()


def _device_of(local_rank: int, device: torch.device | str | None) -> torch.device:
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return chosen
    if chosen.index is None:
        chosen = choose_device(f"cuda:{local_rank}")
    torch.cuda.set_device(chosen)
    return chosen


def _connect(device: torch.device, rank: int, world: int, timeout_seconds: float) -> None:
    limit = timedelta(seconds=timeout_seconds)
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=limit))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(_life(), store),
            rank=rank,
            world_size=world,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ParallelError(
            f"Rank {rank} of {world} could not meet the others at {place} within {timeout_seconds:g} s: "
            f"{str(error).splitlines()[0]}\nAre all machines started, with the same --nnodes and --rdzv-endpoint, and "
            "is that port open between them?"
        ) from error


def _life() -> str:
    """Which life of the ranks this is, where torchrun started them again on one machine.

    With a fixed --master-port its store outlives them, and would lead to the dead ones' addresses. (Over several
    machines --rdzv-backend c10d makes a new store each time, and machines may count their restarts differently.)
    """
    is_one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if is_one_machine else 0}"


def _mesh(shape: tuple[int, int], device: torch.device, timeout_seconds: float) -> Mesh:
    """Ranks row by row: those of one copy of the dictionary, who talk most, are neighbours."""
    table = torch.arange(dist.get_world_size()).view(shape)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    machines = [
        [rank for rank in row if rank // local_size == m] for row in table.tolist() for m in range(table.numel())
    ]
    traffic = Traffic()
    lists = {"world": [table.flatten().tolist()], "dp": table.T.tolist(), "tp": table.tolist()}
    lists["near"] = [ranks for ranks in machines if ranks]
    made = {name: _groups(name, each, traffic, timeout_seconds) for name, each in lists.items()}
    return Mesh(
        **{name: group for name, (group, _) in made.items()},
        device=device,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=local_size,
        device_mesh=DeviceMesh.from_group(
            [made["dp"][1], made["tp"][1]], device.type, table, mesh_dim_names=("dp", "tp")
        ),
    )


def _groups(
    name: str, lists: list[list[int]], traffic: Traffic, timeout_seconds: float
) -> tuple[Group, dist.ProcessGroup]:
    """The one of several disjoint groups that this rank is in."""
    rank = dist.get_rank()
    made, _ = dist.new_subgroups_by_enumeration(lists, timeout=timedelta(seconds=timeout_seconds))
    process_group = cast(dist.ProcessGroup, made)
    ranks = next(ranks for ranks in lists if rank in ranks)
    return Group(name, ranks, rank, process_group, traffic, timeout_seconds), process_group
