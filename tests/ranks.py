"""Several ranks of one run as processes of this machine, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# What torchrun does when one rank has died, it does at once; a test that waits longer than this has found a deadlock.
LONGEST_SECONDS = 240


def context_with(*modules: str) -> Any:
    """Makes processes that have imported these modules when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def start_ranks(context: Any, world: int, work: Callable[..., None], *arguments: Any, log: Path) -> list[BaseProcess]:
    """Start `world` processes that each call `work(*arguments)`; what they print to stderr goes to `log.<rank>`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_run, args=(rank, world, port, log, work, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def run_ranks(context: Any, world: int, work: Callable[..., None], *arguments: Any, log: Path) -> list[int | None]:
    """Start ranks and wait for them; their exit codes."""
    return wait_for(start_ranks(context, world, work, *arguments, log=log))


def wait_for(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Exit codes; once one rank has failed the others are ended, as torchrun does."""
    waiting = list(processes)
    while waiting:
        waiting[0].join(0.1 if len(waiting) > 1 else LONGEST_SECONDS)
        assert len(waiting) > 1 or waiting[0].exitcode is not None, "a rank hangs"
        waiting = [process for process in waiting[1:] + waiting[:1] if process.exitcode is None]
        if any(process.exitcode not in (None, 0) for process in processes):
            for process in waiting:
                process.terminate()
                process.join(LONGEST_SECONDS)
            break
    return [process.exitcode for process in processes]


def printed(log: Path, rank: int) -> str:
    """What a rank printed to stderr."""
    return log.with_suffix(f".{rank}").read_text()


def _run(rank: int, world: int, port: int, log: Path, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    import torch

    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    # For good: what a process dies of is printed after this function has been left.
    sys.stderr = open(log.with_suffix(f".{rank}"), "w")  # noqa: SIM115
    work(*arguments)
