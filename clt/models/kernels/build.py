"""Compiles the C files in this folder, once per machine, and loads them.

No compiler, no kernels: everything then runs in torch operations, slower and equal. `CLT_KERNELS=torch` asks for that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = ("sparse.c", "select.c", "screen.c", "dense.c")
_HEADERS = ("select.h",)
# Not -ffast-math: a NaN must stay one, or a broken step would not be noticed.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_TIMEOUT_SECONDS = 120.0

_log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are not wanted or cannot be built."""
    if os.environ.get("CLT_KERNELS", "auto") == "torch":
        return None
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        _log.info("No C compiler found: training runs in torch operations only.")
        return None
    folder = Path(__file__).parent
    sources = [folder / name for name in SOURCES]
    path = cache_folder() / f"kernels-{_fingerprint(compiler, sources)}.so"
    try:
        if not path.exists():
            _compile(compiler, sources, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("The kernels could not be built (%s): training runs in torch operations only.", error)
        return None


def cache_folder() -> Path:
    """Where what was found out about this machine is kept: $XDG_CACHE_HOME/crosslayer, else ~/.cache/crosslayer."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "crosslayer"


def processor() -> str:
    """Name of this machine's processor, and what it can do."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in first if line.startswith(("model name", "flags", "Features")))
    return f"{platform.machine()} {platform.processor()}"


def _fingerprint(compiler: str, sources: list[Path]) -> str:
    parts = [compiler, processor(), torch.__version__, *_FLAGS]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in [*sources, *(source.with_name(name) for source in sources[:1] for name in _HEADERS)]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, sources: list[Path], path: Path) -> None:
    """Write `path` whole or not at all: several processes may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *_FLAGS, "-shared", *map(str, sources), "-o", str(made), *_openmp(), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_SECONDS)
        made.replace(path)


def _openmp() -> list[str]:
    """torch's own OpenMP library, where it brings one: two of them in one process would get in each other's way."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [str(own[0])] if own else []
