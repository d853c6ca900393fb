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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.data.stores import BaseActivationStore
from clt.errors import CheckpointError
from clt.models import CrossLayerTranscoder
from clt.models.checkpoint import CONFIG, WEIGHTS, load_transcoder, read_tensors, save_tensors
from clt.models.slices import STATE, TRAINER, Sliced, Slices
from clt.parallel.collectives import agreed
from clt.parallel.slices import Held, features_of, held, held_weights, join_parts, load_weights, own_part
from clt.training.dead import DeadFeatureTracker
from clt.training.optim import optimizer_tensors, restore_optimizer
from clt.training.run_folder import PendingCheckpoint, RunFolder, step_of
from clt.training.step import Engine

Files = dict[str, dict[str, Tensor]]
"""Tensors by file and name."""


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


@dataclass(frozen=True)
class _Write:
    """A checkpoint whose tensors are being written."""

    pending: PendingCheckpoint
    folder: Path
    state: str
    entries: dict[str, Sliced]
    job: Future[None]


class HostCopies:
    """Copies of tensors in the host's memory, which is kept for the next copies."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    def of(self, files: Files) -> Files:
        """The same tensors as they are now."""
        return {file: {name: self._copy((file, name), value) for name, value in files[file].items()} for file in files}

    def _copy(self, key: tuple[str, str], value: Tensor) -> Tensor:
        if key not in self._memory:
            self._memory[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return self._memory[key].copy_(value.detach())


def _write(folder: Path, files: Files) -> None:
    for name, tensors in files.items():
        save_tensors(tensors, folder / name)


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
        self._copies = HostCopies()
        self._write: _Write | None = None

    def save(self, waits: bool = True) -> None:
        """Write a checkpoint of the present step, whole or not at all, and delete those no longer wanted.

        Of several ranks each writes its slices (clt/models/slices.py says what the folder then holds).

        Args:
            waits: return when it is there. Else another thread writes copies in the host's memory, while training goes
                on; `poll` says when it is there. One that is still being written is waited for first.

        Raises:
            CheckpointError: this or the one before could not be written.
        """
        self.finish()
        mesh = self._engine.mesh
        pending = self._folder.new_checkpoint(self._progress.step)
        folder = agreed(mesh.world, pending.begin, "the checkpoint's folder")
        files, entries = self._files()
        pool = ThreadPoolExecutor(1, "checkpoint")
        job = pool.submit(_write, folder, files if waits else self._copies.of(files))
        pool.shutdown(wait=False)
        self._write = _Write(pending, folder, self._state(), entries, job)
        if waits:
            self.finish()

    def poll(self) -> None:
        """Finish what another thread was writing, if it is done on every rank.

        Raises:
            CheckpointError: it could not be written.
        """
        mesh = self._engine.mesh
        if self._write is not None and not mesh.world.any(not self._write.job.done(), "checkpoint", mesh.device):
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written; from then on it is a checkpoint."""
        write, self._write = self._write, None
        if write is None:
            return
        mesh = self._engine.mesh
        try:
            if mesh.is_alone:
                write.job.result()
            else:
                join_parts(write.folder, write.entries, write.job.result, mesh)
        except BaseException:
            write.pending.drop()
            raise
        agreed(mesh.world, lambda: self._complete(write), "the checkpoint's state")

    def close(self) -> None:
        """The run ends here, for whatever reason: finish what is being written; where ranks cannot agree, drop it."""
        if self._engine.mesh.is_alone:
            self.finish()
        elif self._write is not None:
            wait([self._write.job])
            self._write = None
        self._copies = HostCopies()

    def _complete(self, write: _Write) -> None:
        self._engine.model.peers.whole.to_json(write.folder / CONFIG)
        with (write.folder / STATE).open("w") as file:
            file.write(write.state)
            file.flush()
            os.fsync(file.fileno())
        write.pending.finish()
        self._folder.keep_only(self._kept(json.loads(write.state)["best_step"]))

    def _files(self) -> tuple[Files, dict[str, Sliced]]:
        """What this rank writes, and what the index says of it if there are several."""
        if self._engine.mesh.is_alone:
            return {WEIGHTS: dict(self._engine.model.state_dict()), TRAINER: self._tensors()}, {}
        part = own_part(self._slices(), self._engine.mesh)
        return {part.file: part.tensors}, part.entries

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

    def _state(self) -> str:
        """As JSON, since what it describes changes while tensors are written."""
        engine = self._engine
        values = {
            **asdict(self._progress),
            "n_skipped": engine.n_skipped,
            "route": None if engine.routes is None else engine.routes.route,
            "scaler": engine.scaler.state_dict(),
            "store": self._store.state_dict(),
        }
        return json.dumps(values)

    def _kept(self, best_step: int | None) -> set[int]:
        """The newest few, the best and the milestones."""
        config = self._engine.config
        steps = [step_of(folder) for folder in self._folder.checkpoints()]
        kept = set(steps[-config.keep_checkpoints :])
        if config.milestone_interval is not None:
            kept |= {step for step in steps if step % config.milestone_interval == 0}
        return kept if best_step is None else kept | {best_step}

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
