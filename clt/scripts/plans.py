"""Lines that several commands' plans (`--dry-run`) have in common, and the file that `--config` reads again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clt.config import CLTConfig
from clt.config.base import write_text_atomically
from clt.scripts.invoke import plain


def transcoder_line(folder: str) -> str:
    """What lies in a transcoder's folder, without loading its weights.

    Raises:
        ConfigError: its cfg.json cannot be read.
    """
    path = Path(folder)
    if (path / "cfg.json").is_file() and (path / "clt.safetensors").is_file():
        config = CLTConfig.from_json(path / "cfg.json")
        return f"{folder}: {config.num_layers} x {config.num_features:,} features, {config.activation_fn}"
    return f"{folder}: another project's transcoder" if path.exists() else f"{folder}, from the Hugging Face Hub"


def record_options(folder: Path, options: Any) -> None:
    """Write run.json with the options of a command, for `--config FOLDER`; access tokens stay out."""
    write_text_atomically(folder / "run.json", json.dumps({"options": plain(options)}, indent=2) + "\n")
