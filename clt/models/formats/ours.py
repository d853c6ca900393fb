"""Our own folders behind the same door, so that what is fetched from the Hub is copied like anybody's."""

from __future__ import annotations

from pathlib import Path

from clt.config import CLTConfig
from clt.models.checkpoint import CONFIG, WEIGHTS
from clt.models.formats.files import TensorFile
from clt.models.formats.portable import Portable

NAME = "ours"


def detect(folder: Path) -> bool:
    """Whether a folder holds `cfg.json` and `clt.safetensors`."""
    return (folder / CONFIG).exists() and (folder / WEIGHTS).exists()


def read(folder: Path) -> Portable:
    """The transcoder of a folder."""
    weights = TensorFile(folder / WEIGHTS)
    config = CLTConfig.from_json(folder / CONFIG)
    return Portable(NAME, config, lambda: ((name, weights.tensor(name)) for name in sorted(weights.names)))
