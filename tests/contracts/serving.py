"""A real activation server in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(root: Path, token: str | None = None, app: str = "clt_server.main:app") -> Iterator[str]:
    """Serve a folder on a free port of this machine; gives the address."""
    log = root.with_name(root.name + ".log")
    command = [sys.executable, "-m", "uvicorn", app, "--port", "0", "--log-level", "info"]
    environment = {**os.environ, "STORAGE_BASE_DIR": str(root)}
    if token:
        environment["CLT_SERVER_TOKEN"] = token
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
    try:
        while "running on " not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.05)
        yield log.read_text().split("running on ")[1].split()[0]
    finally:
        process.terminate()
        process.wait()
