"""Exports made by the environment that crosslayer is installed in, for the one that the other projects are in."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def ours(*arguments):
    """Our half, in our environment."""
    python = os.environ.get("CLT_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-m", "tests.interop.ours", *map(str, arguments)],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder with every case's export and what we compute from it."""
    folder = tmp_path_factory.mktemp("made")
    ours("make", folder)
    return folder
