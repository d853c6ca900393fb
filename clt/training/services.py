"""Trackers that send a run's numbers to a service; each needs its own package."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clt.config import TrainingConfig
from clt.config.base import write_text_atomically
from clt.errors import ConfigError
from clt.training.trackers import Tracker

_WANDB_ID = "wandb_run_id.txt"


def service_trackers(config: TrainingConfig, folder: Path, options: dict[str, Any], resumes: bool) -> list[Tracker]:
    """The services that the options switch on.

    Args:
        config: says which, and under which names.
        folder: of the run.
        options: recorded with the run.
        resumes: go on with the service's run instead of beginning another.

    Raises:
        ConfigError: a package is not installed.
    """
    trackers: list[Tracker] = []
    if config.enable_wandb:
        trackers.append(WandbTracker(config, folder, options, resumes))
    if config.enable_trackio:
        trackers.append(TrackioTracker(config, folder, options, resumes))
    return trackers


def require_services(config: TrainingConfig) -> None:
    """Refuse, before any work is done, to use a service whose package is missing."""
    for name, wanted in (("wandb", config.enable_wandb), ("trackio", config.enable_trackio)):
        if wanted:
            _import(name)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f"TrainingConfig.enable_{name} = True needs {name}, which is not installed.\n"
            f"`pip install 'crosslayer[{name}]'`, or leave the flag out: metrics.jsonl has the same numbers."
        ) from None


class WandbTracker:
    """Weights & Biases; WANDB_MODE=offline keeps everything on this machine."""

    def __init__(self, config: TrainingConfig, folder: Path, options: dict[str, Any], resumes: bool) -> None:
        wandb = _import("wandb")
        remembered = folder / _WANDB_ID
        run_id = remembered.read_text() if resumes and remembered.exists() else None
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_run_name or folder.resolve().name,
            tags=list(config.wandb_tags),
            config=options,
            dir=str(folder),
            id=run_id,
            resume="allow",
        )
        write_text_atomically(remembered, self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class TrackioTracker:
    """Trackio, which keeps its data base on this machine."""

    def __init__(self, config: TrainingConfig, folder: Path, options: dict[str, Any], resumes: bool) -> None:
        self._trackio = _import("trackio")
        self._trackio.init(
            project=config.trackio_project,
            name=folder.resolve().name,
            config=options,
            resume="allow" if resumes else "never",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of one step."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything is written."""
        self._trackio.finish()
