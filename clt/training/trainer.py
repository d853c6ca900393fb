"""Trains a transcoder: batch, forward, losses, backward, step; everything else listens or is asked now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from clt.config import CLTConfig, ParallelConfig, TrainingConfig
from clt.data.stores import BaseActivationStore
from clt.errors import ConfigError
from clt.models import CrossLayerTranscoder
from clt.parallel.collectives import agreed
from clt.parallel.data_shard import divided
from clt.parallel.mesh import Mesh, mesh_of_one
from clt.parallel.slices import save_result
from clt.training.checkpointing import Checkpoints, Progress
from clt.training.dead import DeadFeatureTracker
from clt.training.evaluator import Evaluation, evaluate
from clt.training.interrupts import Interrupts, TimeLimit
from clt.training.losses import Losses
from clt.training.meet_l0 import factor_for_l0, scale_thresholds
from clt.training.run_folder import METRICS, RunFolder
from clt.training.schedules import sparsity_weight, steered
from clt.training.seed_output import write_final_folder
from clt.training.services import require_services, service_trackers
from clt.training.setup import (
    build_model,
    data_fingerprint,
    open_store,
    require_measure,
    require_parallel,
    require_penalty,
    require_same_shape,
)
from clt.training.step import Engine, StepResult
from clt.training.trackers import JSONLTracker, ProgressTracker, Tracker
from clt.types import ActivationBatch


class CLTTrainer:
    """One run: a transcoder, its data, and a folder in which the run can stop and go on."""

    def __init__(
        self,
        clt_config: CLTConfig,
        training_config: TrainingConfig,
        log_dir: str | Path,
        device: torch.device | str | None = None,
        *,
        store: BaseActivationStore | None = None,
        held_out: Callable[[], Iterable[ActivationBatch]] | None = None,
        fidelity: Callable[[CrossLayerTranscoder], Mapping[str, float]] | None = None,
        trackers: Sequence[Tracker] = (),
        resume_step: int | None = None,
        details: dict[str, Any] | None = None,
        shows_progress: bool = True,
        mesh: Mesh | None = None,
        parallel: ParallelConfig | None = None,
    ) -> None:
        """Open the data and build (or, if the folder holds an unfinished run, restore) everything.

        Args:
            clt_config: what to train.
            training_config: how.
            log_dir: the run's folder; an unfinished run with the same options in it is gone on with.
            device: torch device; None: a GPU if there is one.
            store: activations; None: `training_config.activation_path`.
            held_out: gives held-out batches for the evaluations during the run; None: none.
            fidelity: measures the transcoder in its host every `fidelity_interval` steps, by the names of the numbers
                (`clt.replacement.FidelityProbe`).
            trackers: listeners beside `metrics.jsonl`, the progress bar and the services of the options.
            resume_step: go back to the checkpoint of this step; None: to the newest.
            details: recorded in run.json beside the options, for those who go on with the run.
            shows_progress: draw a progress bar.
            mesh: the ranks that train together (clt.parallel.mesh.open_mesh); None: only this process. All of them
                make the same trainer, on one folder that all can write to.
            parallel: how they divide the work.

        Raises:
            ConfigError: the data do not fit the transcoder, the folder holds a run with other options, or an option
                needs a package that is not installed.
        """
        if training_config.normalization_method is not None:
            clt_config = clt_config.replace(normalization_method=training_config.normalization_method)
        require_services(training_config)
        require_penalty(clt_config, training_config)
        require_measure(training_config, fidelity)
        self.clt_config, self.config = clt_config, training_config
        self.mesh, parallel = mesh or mesh_of_one(device), parallel or ParallelConfig()
        require_parallel(training_config, self.mesh)
        self.folder = RunFolder(log_dir)
        whole_batches = store if store is not None else open_store(training_config)
        require_same_shape(clt_config, whole_batches)
        self.held_out, self._fidelity = held_out, fidelity
        self.progress = Progress()
        self._options = {"clt": clt_config.to_dict(), "training": training_config.to_dict(), **(details or {})}
        self.model = build_model(clt_config, whole_batches, self.mesh, training_config.seed)
        self.engine = Engine(self.model, training_config, self.mesh, parallel.shard_optimizer)
        agreed(self.mesh.world, lambda: self._begin(data_fingerprint(whole_batches)), "the run's folder")
        self.store = divided(whole_batches, self.mesh, training_config.micro_batch_tokens, parallel.one_reader)
        self.dead = DeadFeatureTracker(
            clt_config.num_layers, self.model.config.num_features, training_config.dead_feature_window, self.device
        )
        self.checkpoints = Checkpoints(self.folder, self.engine, self.dead, self.store, self.progress)
        self._waited = self._worked = 0.0  # seconds spent on getting batches, and on steps
        self._extra_trackers, self._shows_progress = trackers, shows_progress
        self.was_finished = self.mesh.world.tell(self.folder.is_finished, "the run's folder")
        """The folder holds the result already; there is nothing to train."""
        if not self.was_finished:
            self.checkpoints.restore(resume_step)

    def _begin(self, fingerprint: str) -> None:
        clt, training = self.clt_config, self.config
        self.folder.begin(
            self._options,
            {"fingerprint": fingerprint},
            compared={"clt": clt.to_dict(), "training": training.affecting_the_result()},
            defaults={"clt": type(clt).defaults(), "training": type(training).defaults()},
        )

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.mesh.device

    @property
    def step(self) -> int:
        """Steps done so far."""
        return self.progress.step

    # --- the run ----------------------------------------------------------------------------------------------

    def train(self) -> CrossLayerTranscoder:
        """Run to the last step, save, and return the transcoder.

        Ctrl-C and SIGTERM finish the step, write a checkpoint and raise KeyboardInterrupt.

        Raises:
            TimeLimitReached: a checkpoint was written because `time_limit_minutes` is over.
        """
        for _ in self.steps():
            pass
        return self.model

    def steps(self) -> Generator[int, None, None]:
        """The run of `train`, giving control back after each step; several runs can so share one pass over the data."""
        if self.was_finished:
            self.model = CrossLayerTranscoder.from_pretrained(self.folder.path, self.device)
            return
        limit = TimeLimit(self.config.time_limit_minutes)
        trackers = self._open_trackers()
        self._clock = time.perf_counter() - self.progress.seconds
        try:
            with Interrupts() as interrupts, closing(self.checkpoints):
                while self.step < self.config.training_steps:
                    self._one_step(trackers)
                    self.checkpoints.poll()
                    self._stop_if_asked(interrupts.requested, limit)
                    yield self.step
                self.checkpoints.finish()
            self._finish()
        finally:
            for tracker in trackers:
                tracker.close()

    def _stop_if_asked(self, is_interrupted: bool, limit: TimeLimit) -> None:
        """Write a checkpoint and stop if a signal came or the time is over, on whichever rank."""
        is_over = limit.is_over and self.step < self.config.training_steps
        asked = 2 if is_interrupted else int(is_over)
        asked = self.mesh.world.largest(asked, "signals", self.device)
        if asked:
            self.checkpoints.save()
            limit.stop(self.step, self.config.training_steps, asked == 2)

    def _open_trackers(self) -> list[Tracker]:
        if not self.mesh.is_main:
            return []
        folder = self.folder.path
        return [
            JSONLTracker(folder / METRICS, self.step),
            *([ProgressTracker(self.config.training_steps, self.step)] if self._shows_progress else []),
            *service_trackers(self.config, folder, self._options, resumes=self.step > 0),
            *self._extra_trackers,
        ]

    def _finish(self) -> None:
        """The result: the mean weights if there are any, else the last."""
        if self.engine.average is not None:
            self.engine.average.adopt()
        save_result(self.model, self.mesh, self.folder.path)
        agreed(self.mesh.world, self._close_folder, "the run's folder")

    def _close_folder(self) -> None:
        path, progress = self.folder.path, self.progress
        if self.config.write_final_folder:
            whole = self.model if self.mesh.is_alone else CrossLayerTranscoder.from_pretrained(path, "cpu")
            write_final_folder(whole, path)
        summary = {"seconds": progress.seconds, "tokens": progress.tokens_seen, "steps": progress.step}
        best = {"step": progress.best_step, "nmse": progress.best_nmse}
        self.folder.finish({**summary, "skipped_steps": self.engine.n_skipped, "best_held_out": best})

    def _one_step(self, trackers: Sequence[Tracker]) -> None:
        config = self.config
        start = time.perf_counter()
        batch = next(self.store)
        waited = time.perf_counter()
        result = self.update(batch)
        self._waited += waited - start
        self._worked += time.perf_counter() - waited
        self.progress.seconds = time.perf_counter() - self._clock
        last = self.step == config.training_steps
        values: dict[str, float] = {}
        if self.step % config.log_interval == 0 or last:
            values = self._measure(result)
        if last:
            values |= self._meet_target_l0()
        is_best = False
        if self.held_out is not None and (self.step % config.eval_interval == 0 or last):
            held_out = self.mesh.world.tell(self._measure_held_out(), "held-out figures")
            is_best = self._note_best(held_out["held_out/nmse"])
            values |= held_out
        if self._fidelity is not None and (self.step % (config.fidelity_interval or 1) == 0 or last):
            values |= self._measure_fidelity(self._fidelity)
        if values:
            for tracker in trackers:
                tracker.log(self.step, values)
        if (is_best or self.step % config.checkpoint_interval == 0) and not last:
            self.checkpoints.save(waits=not config.async_save)

    def update(self, batch: ActivationBatch) -> StepResult:
        """One optimiser step on one batch."""
        self.engine.losses.sparsity_factor = self.progress.sparsity_factor
        result = self.engine.step(batch, self.step, self.dead.dead)
        if not result.skipped:
            self.dead.update(result.fired, result.n_tokens)
            self._steer(result)
        self.progress.step += 1
        self.progress.tokens_seen += result.n_tokens
        return result

    def _steer(self, result: StepResult) -> None:
        """Move the sparsity weight towards the target L0, if there is one."""
        if self.config.sparsity_target_l0 is not None:
            l0 = float(result.n_fired) / (result.n_tokens * self.clt_config.num_layers)
            self.progress.sparsity_factor = steered(self.config, self.progress.sparsity_factor, l0, self.step)

    def _meet_target_l0(self) -> dict[str, float]:
        """After the last step, scale the thresholds of the result so that its L0 is the one asked for."""
        config, average = self.config, self.engine.average
        target, n_tokens = config.sparsity_target_l0, config.sparsity_target_tokens
        if target is None or n_tokens == 0 or self.clt_config.activation_fn != "jumprelu":
            return {}
        if average is not None:
            average.adopt()
        factor, counted = factor_for_l0(self.model, self.store, target, n_tokens, self.mesh)
        scale_thresholds(self.model, factor)
        if average is not None:
            average.restore({name: value.detach() for name, value in self.model.named_parameters()})
        return counted

    # --- numbers ----------------------------------------------------------------------------------------------

    def _measure(self, result: StepResult) -> dict[str, float]:
        layers, n_features = self.clt_config.num_layers, self.clt_config.num_features
        values = {
            "loss": result.losses.total,
            **{name: getattr(result.losses, name) for name in Losses.__dataclass_fields__},
            "l0": int(result.n_fired) / (result.n_tokens * layers),
            "dead": self.mesh.tp.sum_(self.dead.dead.float().sum(), "dead features") / (layers * n_features),
            "gradient_norm": result.gradient_norm,
        }
        numbers = {name: float(value) for name, value in values.items()}
        if self.config.loss_normalisation == "variance":
            numbers["nmse"] = numbers["reconstruction"] / layers
        numbers["learning_rate"] = self.engine.learning_rate
        numbers["sparsity_lambda"] = sparsity_weight(self.config, self.step - 1) * self.engine.losses.sparsity_factor
        numbers["tokens"] = self.progress.tokens_seen
        numbers["data_share"] = self._waited / (self._waited + self._worked)
        numbers["tokens_per_second"] = self.progress.tokens_seen / self.progress.seconds
        return numbers

    def evaluate(self, limit: int | None = None) -> Evaluation:
        """Metrics of the result so far (the mean weights if there are any) on the first `limit` held-out batches."""
        if self.held_out is None:
            raise ConfigError("This trainer was given no held-out activations to evaluate on.")
        batches = (batch for index, batch in enumerate(self.held_out()) if limit is None or index < limit)
        with self._result_in_place():
            return evaluate(self.model, batches)

    def _result_in_place(self) -> AbstractContextManager[None]:
        """While the block runs, the model has the weights that the run would have as its result now."""
        average = self.engine.average
        return nullcontext() if average is None else average.in_place()

    def _measure_fidelity(self, measure: Callable[[CrossLayerTranscoder], Mapping[str, float]]) -> dict[str, float]:
        """What the host makes of the result so far; draws none of the run's random numbers."""
        devices = [self.device] if self.device.type == "cuda" else []
        with self._result_in_place(), torch.no_grad(), torch.random.fork_rng(devices):
            return dict(measure(self.model))

    def _measure_held_out(self) -> dict[str, float]:
        result = self.evaluate(self.config.eval_batches)
        return {
            "held_out/nmse": result.nmse,
            "held_out/l0": result.l0,
            "held_out/dead_share": result.dead_share,
            **{f"held_out/nmse/{layer}": value for layer, value in enumerate(result.nmse_per_layer)},
        }

    def _note_best(self, nmse: float) -> bool:
        """Whether this is the best evaluation so far."""
        progress = self.progress
        if progress.best_nmse is not None and not nmse < progress.best_nmse:
            return False
        progress.best_step, progress.best_nmse = self.step, nmse
        return True
