"""Everything a run needs to go on exactly, as files of one checkpoint folder.

cfg.json, clt.safetensors    the transcoder
trainer.safetensors          moments of the optimiser, mean weights, silence counters, torch's generator
trainer.json                 step, position in the data, loss scale, the best step so far

Several ranks write slices of the same tensors instead, which any number of ranks can go on from.

Training draws no random numbers (initial weights and the order of the data come from their own seeds), so Python's and
NumPy's generators are not saved; torch's is, for losses of one's own that do.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.data.stores import BaseActivationStore
from clt.errors import CheckpointError
from clt.models import CrossLayerTranscoder
from clt.models.checkpoint import CONFIG, load_transcoder, read_tensors, save_tensors, save_transcoder
from clt.models.slices import STATE, TRAINER, Slices
from clt.parallel.collectives import agreed
from clt.parallel.slices import Held, features_of, held, held_weights, load_weights, save_slices
from clt.training.dead import DeadFeatureTracker
from clt.training.optim import optimizer_tensors, restore_optimizer
from clt.training.run_folder import PendingCheckpoint, RunFolder, step_of
from clt.training.step import Engine


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Steps done."""
    tokens_seen: int = 0
    """Tokens trained on so far, counting repeats."""
    seconds: float = 0.0
    """Time spent in training so far, over all sessions of the run."""
    sparsity_factor: float = 1.0
    """Of the sparsity weight, where it is steered to an L0."""
    best_step: int | None = None
    best_nmse: float | None = None
    """Of the evaluations on held-out tokens so far."""


class Checkpoints:
    """Saves and restores the parts of a run in its folder."""

    def __init__(
        self,
        folder: RunFolder,
        engine: Engine,
        dead: DeadFeatureTracker,
        store: BaseActivationStore,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._dead = dead
        self._store = store
        self._progress = progress

    def save(self) -> None:
        """Write a checkpoint of the present step, whole or not at all, and delete those no longer wanted.

        Of several ranks each writes its slices (clt/models/slices.py says what the folder then holds).
        """
        engine, mesh = self._engine, self._engine.mesh
        pending = self._folder.new_checkpoint(self._progress.step)
        folder = agreed(mesh.world, pending.begin, "the checkpoint's folder")
        try:
            if mesh.is_alone:
                save_transcoder(engine.model, folder)
                save_tensors(self._tensors(), folder / TRAINER)
            else:
                save_slices(folder, self._slices(), mesh)
        except BaseException:
            pending.drop()
            raise
        agreed(mesh.world, lambda: self._complete(pending, folder), "the checkpoint's state")

    def _complete(self, pending: PendingCheckpoint, folder: Path) -> None:
        if not self._engine.mesh.is_alone:
            self._engine.model.peers.whole.to_json(folder / CONFIG)
        with (folder / STATE).open("w") as file:
            json.dump(self._state(), file)
            file.flush()
            os.fsync(file.fileno())
        pending.finish()
        self._folder.keep_only(self._kept())

    def _tensors(self) -> dict[str, Tensor]:
        """All but the weights."""
        engine = self._engine
        moments = optimizer_tensors(engine.optimizer, engine.owned.parameters)
        tensors = {f"optimizer/{name}": value for name, value in moments.items()}
        if engine.average is not None:
            tensors.update({f"average/{name}": value for name, value in engine.average.tensors().items()})
        tensors["dead/silent_for"] = self._dead.silent_for
        tensors["rng/torch"] = torch.get_rng_state()
        return tensors

    def _slices(self) -> dict[str, Held]:
        """What this rank writes: of what all copies of its part have, the first; of moments, those it looks after."""
        engine, mesh = self._engine, self._engine.mesh
        n_features = engine.model.peers.whole.num_features
        mine = held_weights(engine.model, mesh)
        for name, value in self._tensors().items():
            rows = engine.owned.features(name)
            if mesh.dp.rank == 0 or rows is not None:
                mine[f"trainer/{name}"] = held(
                    f"trainer/{name}", value, n_features, rows or features_of(n_features, mesh)
                )
        return mine

    def _state(self) -> dict[str, Any]:
        engine = self._engine
        return {
            **asdict(self._progress),
            "n_skipped": engine.n_skipped,
            "route": None if engine.routes is None else engine.routes.route,
            "scaler": engine.scaler.state_dict(),
            "store": self._store.state_dict(),
        }

    def _kept(self) -> set[int]:
        """The newest few, the best and the milestones."""
        config = self._engine.config
        steps = [step_of(folder) for folder in self._folder.checkpoints()]
        kept = set(steps[-config.keep_checkpoints :])
        if config.milestone_interval is not None:
            kept |= {step for step in steps if step % config.milestone_interval == 0}
        if self._progress.best_step is not None:
            kept.add(self._progress.best_step)
        return kept

    def restore(self, step: int | None = None) -> None:
        """Go on from the checkpoint of a step (later ones are deleted), or from the newest if there is one.

        Raises:
            CheckpointError: there is no checkpoint of that step, or it is damaged.
        """
        chosen = agreed(self._engine.mesh.world, lambda: self._prepare(step), "the checkpoint to go on from")
        if chosen is None:
            return
        self._load(chosen)
        agreed(self._engine.mesh.world, lambda: self._forget_after(chosen), "the checkpoints")

    def _prepare(self, step: int | None) -> Path | None:
        self._folder.clean_up()
        return self._choose(step)

    def _forget_after(self, chosen: Path) -> None:
        self._folder.keep_only({step_of(folder) for folder in self._folder.checkpoints() if folder <= chosen})

    def _choose(self, step: int | None) -> Path | None:
        checkpoints = self._folder.checkpoints()
        if step is None:
            return checkpoints[-1] if checkpoints else None
        for folder in checkpoints:
            if step_of(folder) == step:
                return folder
        there = ", ".join(str(step_of(folder)) for folder in checkpoints) or "none"
        raise CheckpointError(f"{self._folder.path} has no checkpoint of step {step}. Steps there: {there}.")

    def _load(self, folder: Path) -> None:
        engine = self._engine
        state = _read_state(folder)
        if engine.mesh.is_alone and not Slices.is_sliced(folder):
            weights = load_transcoder(CrossLayerTranscoder, folder, engine.device).state_dict()
            engine.model.load_state_dict(weights)
            tensors = read_tensors(folder / TRAINER)
        else:
            load_weights(engine.model, folder, engine.mesh)
            tensors = self._read_mine(Slices.open(folder))
        restore_optimizer(engine.optimizer, engine.owned.parameters, _part(tensors, "optimizer/"))
        if engine.average is not None:
            engine.average.restore(_part(tensors, "average/"))
        self._dead.silent_for.copy_(tensors["dead/silent_for"])
        torch.set_rng_state(tensors["rng/torch"])
        engine.n_skipped = state["n_skipped"]
        if engine.routes is not None and state.get("route") is not None:
            engine.routes.route = state["route"]
        if state["scaler"]:
            engine.scaler.load_state_dict(state["scaler"])
        for name in Progress.__dataclass_fields__:
            setattr(self._progress, name, state[name])
        self._store.load_state_dict(state["store"])

    def _read_mine(self, slices: Slices) -> dict[str, Tensor]:
        """Of what others may have written on another number of ranks, the part that is this rank's."""
        engine = self._engine
        everything = features_of(engine.model.peers.whole.num_features, engine.mesh)
        tensors = {}
        for name in slices.named("trainer/"):
            short = name.removeprefix("trainer/")
            is_cut = slices.tensors[name].axis is not None
            tensors[short] = slices.read(name, (engine.owned.features(short) or everything) if is_cut else None)
        return tensors


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}. Delete it to go on from the one before it.") from None
    wanted = {*Progress.__dataclass_fields__, "n_skipped", "scaler", "store"}
    if not wanted <= state.keys():
        raise CheckpointError(
            f"{folder / STATE} lacks {', '.join(sorted(wanted - state.keys()))}: another version wrote it. Go on with "
            "that version, or train again in another folder."
        )
    return state


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
