"""Weights of other projects as ours, and ours as theirs.

    portable = read(Path("their/folder"))       # whose it is, is found out
    model = build(portable)                     # in memory, or
    write(portable, Path("ours"))               # on disk, one tensor at a time

A format is a module (or class) with `NAME`, `detect(folder)` and `read(folder) -> Portable`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from clt.errors import CheckpointError, ConfigError
from clt.models.formats import circuit_tracer, clt_forge, crosslayer_coding, eleuther, goreg, kokosdev, openmoss, ours
from clt.models.formats.crosslayer_coding import is_crosslayer_coding, read_crosslayer_coding
from clt.models.formats.per_layer import GemmaScope, SAELens
from clt.models.formats.portable import Portable, build, write

__all__ = ["FORMATS", "Portable", "build", "detect", "is_crosslayer_coding", "read", "read_crosslayer_coding", "write"]

# In the order in which a folder is asked: those with files of unmistakable names first.
_ORDER = (
    *(ours, clt_forge, goreg, circuit_tracer, openmoss, eleuther),
    *(kokosdev, SAELens, GemmaScope, crosslayer_coding),
)
FORMATS: dict[str, Any] = {each.NAME: each for each in _ORDER}


def detect(folder: Path) -> str | None:
    """Whose transcoder a folder holds; None: nobody's that is known."""
    return next((name for name, each in FORMATS.items() if folder.is_dir() and each.detect(folder)), None)


def read(folder: Path, format: str | None = None, **options: Any) -> Portable:
    """What a folder of another project holds.

    Args:
        format: whose it is; None: found out from its files.
        options: for that format's reader, such as `norm_stats` or `batchtopk_as_topk`.

    Raises:
        CheckpointError: it is nobody's, or not what its own configuration says.
        ConfigError: it uses an option that has no counterpart here.
    """
    format = format or detect(folder)
    if format not in FORMATS and format is not None:
        raise ConfigError(f"There is no format {format!r}. Formats: {', '.join(FORMATS)}.")
    if format is None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} does not exist, or is no folder (looked from {Path.cwd()}).")
        there = sorted(path.name for path in folder.iterdir())[:8]
        raise CheckpointError(
            f"{folder} is no transcoder that is known here: it holds {', '.join(there) or 'nothing'}. Known: ours "
            f"(cfg.json, clt.safetensors), {', '.join(name for name in FORMATS if name != ours.NAME)}."
        )
    reader = FORMATS[format].read
    unknown = sorted(options.keys() - inspect.signature(reader).parameters.keys())
    if unknown:
        raise ConfigError(f"{folder} is {format}'s, whose reader knows no {', '.join(unknown)}. Leave it out.")
    return reader(folder, **options)
