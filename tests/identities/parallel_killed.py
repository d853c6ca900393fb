"""One rank of a run that torchrun starts: `parallel_killed.py DATA OUT`. In its first life rank 1 kills itself."""

import os
import signal
import sys
from pathlib import Path

import torch

from clt.parallel.mesh import open_mesh
from tests.identities.parallel_driver import trainer_of


def main(data, out):
    torch.set_num_threads(1)
    marker = Path(out) / "killed"
    with open_mesh(dp=2, device="cpu", timeout_seconds=60) as mesh:
        for step in trainer_of(data, Path(out) / "run", "batchtopk", mesh).steps():
            if mesh.rank == 1 and step == 8 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
