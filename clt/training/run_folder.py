"""A run on disk: what was asked for, the newest checkpoints, and the result.

run.json         options, versions, commit, data fingerprint; `finished` once the result is there
metrics.jsonl    one line per logged step
checkpoints/step_00001000/   cfg.json, clt.safetensors, trainer.safetensors, trainer.json
final/           the result once more as crosslayer-coding names it: clt.pt, cfg.json
cfg.json, clt.safetensors    the result
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from clt import __version__
from clt.config.base import write_text_atomically
from clt.errors import CheckpointError, ConfigError

RUN = "run.json"
METRICS = "metrics.jsonl"


def versions() -> dict[str, str]:
    """What computed this, for the record."""
    return {
        "crosslayer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def commit() -> str | None:
    """The commit of the source tree this runs from, if it is a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no commit yet: nothing to record
    return answer.stdout.strip()


class RunFolder:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # --- what was asked for -----------------------------------------------------------------------------------

    def record(self) -> dict[str, Any] | None:
        """The content of run.json, or None for a new folder."""
        file = self.path / RUN
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"{file} is not JSON (line {error.lineno}). Delete the folder to start over."
            ) from None

    def begin(
        self,
        options: dict[str, Any],
        data: dict[str, Any],
        compared: dict[str, Any] | None = None,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        """Write run.json, or check that the run here was asked for in the same way.

        Args:
            options: all of them, for the record.
            data: what identifies the activations.
            compared: the options that decide the result; None: all.
            defaults: what options are that a record of an older version does not know yet.

        Raises:
            ConfigError: the folder holds a run with other options or on other data; names each difference.
        """
        new = {"options": options if compared is None else compared, "data": data}
        old = self.record()
        if old is None:
            record = {"options": options, "data": data, "versions": versions(), "commit": commit(), "finished": False}
            self._write({**record, "command": _without_tokens(sys.argv)})
            return
        differences = list(_differences(_like(old, new, {"options": defaults or {}}), json.loads(json.dumps(new))))
        if differences:
            raise ConfigError(
                f"{self.path} already holds a run with other options:\n" + "\n".join(differences[:10]) + "\n"
                "Choose another output folder, delete this one, or repeat the old options to go on with it."
            )
        if not old["finished"]:
            self._write({**old, "options": options})

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        self._write({**(self.record() or {}), "finished": True, "summary": summary})

    @property
    def is_finished(self) -> bool:
        """Whether the result is there."""
        record = self.record()
        return bool(record and record["finished"])

    def _write(self, record: dict[str, Any]) -> None:
        write_text_atomically(self.path / RUN, json.dumps(record, indent=2) + "\n")

    # --- checkpoints ------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*"))

    def new_checkpoint(self, step: int) -> PendingCheckpoint:
        """A checkpoint folder that appears only when everything is in it."""
        return PendingCheckpoint(self.path / "checkpoints" / f"step_{step:08d}")

    def keep_only(self, steps: set[int]) -> None:
        """Delete the checkpoints of all other steps."""
        for folder in self.checkpoints():
            if step_of(folder) not in steps:
                _remove(folder)

    def clean_up(self) -> None:
        """Delete what a kill in the middle of writing or deleting left behind."""
        for leftover in (self.path / "checkpoints").glob(".step_*"):
            shutil.rmtree(leftover)


def _without_tokens(words: list[str]) -> list[str]:
    """A command line to keep: run folders are shared, so the value of a flag like --server-token is not in it."""
    kept, hides_next = [], False
    for word in words:
        flag, is_joined, _ = word.partition("=")
        is_secret = flag.startswith("--") and flag.endswith("token")
        kept.append("***" if hides_next else f"{flag}=***" if is_secret and is_joined else word)
        hides_next = is_secret and not is_joined
    return kept


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was taken."""
    return int(checkpoint.name.removeprefix("step_"))


def _remove(folder: Path) -> None:
    """Out of sight first, so that a kill in between leaves no half checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


class PendingCheckpoint:
    """A folder to write into (`with` it, or from `begin` to `finish`), which gets its name when everything is there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Path:
        return self.begin()

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self.finish()
        else:
            self.drop()

    def begin(self) -> Path:
        """The empty folder."""
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self._temporary

    def drop(self) -> None:
        """Writing failed: leave nothing behind."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def finish(self) -> None:
        """Everything is there."""
        if self._path.exists():
            _remove(self._path)
        self._temporary.rename(self._path)


def _like(old: Any, new: Any, defaults: Any = None) -> Any:
    """The part of an old record that has the keys of a new one, where both are dictionaries."""
    if isinstance(old, dict) and isinstance(new, dict):
        known = defaults if isinstance(defaults, dict) else {}
        return {key: _like(old.get(key, known.get(key)), new[key], known.get(key)) for key in new}
    return old


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"  {path}: {old!r} there, {new!r} asked for now"]
