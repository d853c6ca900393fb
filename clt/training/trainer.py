"""Trains a transcoder: batch, forward, losses, backward, step; everything else listens or is asked now and then."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.config import CLTConfig, TrainingConfig
from clt.data.stores import BaseActivationStore, LocalActivationStore
from clt.errors import CheckpointError, ConfigError, TrainingError
from clt.models import ActivationStatistics, CrossLayerTranscoder
from clt.models.checkpoint import load_transcoder, read_tensors, save_tensors, save_transcoder
from clt.models.clt import TrainingForward
from clt.training.dead import DeadFeatureTracker
from clt.training.evaluator import Evaluation, evaluate
from clt.training.interrupts import Interrupts
from clt.training.losses import Losses, LossManager
from clt.training.optim import build_optimizer, optimizer_tensors, restore_optimizer, set_learning_rate
from clt.training.run_folder import METRICS, RunFolder
from clt.training.schedules import default_learning_rate, k_factor, learning_rate_factor, sparsity_weight
from clt.training.trackers import JSONLTracker, ProgressTracker, Tracker
from clt.types import ActivationBatch

# Tokens from which the encoder biases are set before training.
_BIAS_TOKENS = 8192
# A feature starts by firing on 10,000 / (all features) of the tokens (Anthropic, January 2025), within these bounds:
# small dictionaries would otherwise start with every feature on everywhere.
_FIRING_TOKENS, _FIRING_BOUNDS = 10_000, (1e-4, 0.05)


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
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Open the data and build (or, if the folder holds an unfinished run, restore) everything.

        Args:
            clt_config: what to train.
            training_config: how.
            log_dir: the run's folder; an unfinished run with the same options in it is gone on with.
            device: torch device; None: a GPU if there is one.
            store: activations; None: `training_config.activation_path`.
            held_out: gives held-out batches for the evaluations during the run; None: none.
            trackers: listeners beside `metrics.jsonl` and the progress bar.

        Raises:
            ConfigError: the data do not fit the transcoder, or the folder holds a run with other options.
        """
        if training_config.normalization_method is not None:
            clt_config = clt_config.replace(normalization_method=training_config.normalization_method)
        self.clt_config, self.config = clt_config, training_config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.folder = RunFolder(log_dir)
        self.store = store if store is not None else self._open_store()
        self._check_data()
        self.held_out = held_out
        self.step = 0
        self.tokens_seen = 0
        """Tokens trained on so far, counting repeats."""
        self.seconds = 0.0
        """Time spent in training steps so far, over all sessions of this run."""
        self.folder.begin(
            {"clt": clt_config.to_dict(), "training": training_config.to_dict()},
            {"fingerprint": data_fingerprint(self.store)},
        )
        self.model = self._build_model()
        self.optimizer = build_optimizer(self.model, training_config, clt_config.num_features)
        self.losses = LossManager(training_config)
        self.dead = DeadFeatureTracker(
            clt_config.num_layers, clt_config.num_features, training_config.dead_feature_window, self.device
        )
        self._extra_trackers = trackers
        self._restore_newest()

    # --- set-up -----------------------------------------------------------------------------------------------

    def _open_store(self) -> BaseActivationStore:
        config = self.config
        if config.activation_path is None:
            raise ConfigError(
                "TrainingConfig.activation_path is not set and no store was given. "
                "Point it at a folder that `clt generate` wrote, for example .../train."
            )
        return LocalActivationStore(
            config.activation_path,
            batch_size_tokens=config.train_batch_size_tokens,
            seed=config.seed,
            dtype=getattr(torch, config.activation_dtype),
        )

    def _check_data(self) -> None:
        """The data must have as many layers and dimensions as the transcoder."""
        for name, ours, data in (
            ("num_layers", self.clt_config.num_layers, self.store.n_layers),
            ("d_model", self.clt_config.d_model, self.store.d_model),
        ):
            if ours != data:
                raise ConfigError(
                    f"CLTConfig.{name} = {ours}, but the activations have {name} = {data}. They were probably "
                    f"captured from another host. Set {name} = {data} or capture again."
                )

    def _build_model(self) -> CrossLayerTranscoder:
        model = CrossLayerTranscoder(self.clt_config, device=self.device, seed=self.config.seed)
        sides = self.store.statistics.inputs, self.store.statistics.targets
        values = [part.float().to(self.device) for side in sides for part in (side.mean, side.std)]
        model.fit_standardisation(ActivationStatistics(*values))
        batch = first_tokens(self.store, _BIAS_TOKENS).to(self.device)
        total = self.clt_config.num_features * self.clt_config.num_layers
        low, high = _FIRING_BOUNDS
        model.fit_encoder_bias(batch.inputs, min(max(_FIRING_TOKENS / total, low), high))
        return model

    # --- the run ----------------------------------------------------------------------------------------------

    def train(self) -> CrossLayerTranscoder:
        """Run to the last step, save, and return the transcoder.

        Ctrl-C and SIGTERM finish the step, write a checkpoint and raise KeyboardInterrupt.
        """
        if self.folder.is_finished:
            return CrossLayerTranscoder.from_pretrained(self.folder.path, self.device)
        trackers: list[Tracker] = [
            JSONLTracker(self.folder.path / METRICS, self.step),
            ProgressTracker(self.config.training_steps, self.step),
            *self._extra_trackers,
        ]
        self._clock = time.perf_counter() - self.seconds
        try:
            with Interrupts() as interrupts:
                while self.step < self.config.training_steps:
                    self._one_step(trackers)
                    if interrupts.requested:
                        self.save_checkpoint()
                        raise KeyboardInterrupt
            save_transcoder(self.model, self.folder.path)
            self.folder.finish({"seconds": self.seconds, "tokens": self.tokens_seen, "steps": self.step})
        finally:
            for tracker in trackers:
                tracker.close()
        return self.model

    def _one_step(self, trackers: Sequence[Tracker]) -> None:
        forward, losses, gradient_norm = self.update(next(self.store))
        config = self.config
        self.seconds = time.perf_counter() - self._clock
        if self.step % config.log_interval == 0 or self.step == config.training_steps:
            values = self._measure(forward, losses, gradient_norm)
            values["tokens_per_second"] = self.tokens_seen / self.seconds
            for tracker in trackers:
                tracker.log(self.step, values)
        if self.held_out is not None and self.step % config.eval_interval == 0:
            self._log_evaluation(trackers)
        if self.step % config.checkpoint_interval == 0 and self.step < config.training_steps:
            self.save_checkpoint()

    def update(self, batch: ActivationBatch) -> tuple[TrainingForward, Losses, Tensor]:
        """One optimiser step on one batch."""
        batch = batch.to(self.device)
        model, step = self.model, self.step
        targets = model.standardise_targets(batch.targets.transpose(0, 1))
        forward = model.forward_training(batch.inputs, k_factor(self.config, step))
        losses = self.losses.compute(model, forward, batch.inputs, targets, step, self.dead.dead)
        self._refuse_nonsense(losses)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        limit = self.config.gradient_clip_val or float("inf")
        gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit, foreach=True)
        set_learning_rate(self.optimizer, self.peak_learning_rate * learning_rate_factor(self.config, step))
        self.optimizer.step()
        self.dead.update(forward.codes, batch.n_tokens)
        self.step += 1
        self.tokens_seen += batch.n_tokens
        return forward, losses, gradient_norm

    @property
    def peak_learning_rate(self) -> float:
        """The configured learning rate, or the default for this dictionary size."""
        return self.config.learning_rate or default_learning_rate(self.clt_config.num_features)

    def _refuse_nonsense(self, losses: Losses) -> None:
        if not torch.isfinite(losses.total):
            terms = {name: getattr(losses, name).item() for name in Losses.__dataclass_fields__}
            wrong = ", ".join(f"{name} = {value}" for name, value in terms.items() if not abs(value) < float("inf"))
            raise TrainingError(
                f"Step {self.step}: the loss is not finite ({wrong}; learning rate {self.peak_learning_rate:.3g}).\n"
                "Usual causes: too high a learning rate, or activations with NaN. The last checkpoint is untouched."
            )

    def _measure(self, forward: TrainingForward, losses: Losses, gradient_norm: Tensor) -> dict[str, float]:
        tokens = len(forward.reconstruction)
        active = torch.stack([code.fired().sum() for code in forward.codes]).sum()
        dead = self.dead.dead.float().mean()
        values = {
            "loss": losses.total,
            **{name: getattr(losses, name) for name in Losses.__dataclass_fields__},
            "l0": active / (tokens * self.clt_config.num_layers),
            "dead": dead,
            "gradient_norm": gradient_norm,
        }
        numbers = {name: float(value.detach()) for name, value in values.items()}
        if self.config.loss_normalisation == "variance":
            numbers["nmse"] = numbers["reconstruction"] / self.clt_config.num_layers
        numbers["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        numbers["sparsity_lambda"] = sparsity_weight(self.config, self.step - 1)
        numbers["tokens"] = self.tokens_seen
        return numbers

    def evaluate(self, limit: int | None = None) -> Evaluation:
        """Metrics on the held-out batches (the first `limit` of them)."""
        if self.held_out is None:
            raise ConfigError("This trainer was given no held-out activations to evaluate on.")
        batches = (batch for index, batch in enumerate(self.held_out()) if limit is None or index < limit)
        return evaluate(self.model, batches)

    def _log_evaluation(self, trackers: Sequence[Tracker]) -> None:
        result = self.evaluate(self.config.eval_batches)
        values = {
            "held_out/nmse": result.nmse,
            "held_out/l0": result.l0,
            "held_out/dead_share": result.dead_share,
            **{f"held_out/nmse/{layer}": value for layer, value in enumerate(result.nmse_per_layer)},
        }
        for tracker in trackers:
            tracker.log(self.step, values)

    # --- checkpoints ------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Everything needed to go on exactly: weights, optimiser, silence counters, position in the data."""
        with self.folder.new_checkpoint(self.step) as folder:
            save_transcoder(self.model, folder)
            tensors = {f"optimizer/{k}": v for k, v in optimizer_tensors(self.optimizer, self.model).items()}
            tensors["dead/silent_for"] = self.dead.silent_for
            tensors["rng/torch"] = torch.get_rng_state()
            save_tensors(tensors, folder / "trainer.safetensors")
            state: dict[str, Any] = {
                "step": self.step,
                "tokens_seen": self.tokens_seen,
                "seconds": self.seconds,
                "store": self.store.state_dict(),
            }
            (folder / "trainer.json").write_text(json.dumps(state))
        self.folder.keep_newest(self.config.keep_checkpoints)

    def _restore_newest(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        checkpoints = self.folder.checkpoints()
        if not checkpoints or self.folder.is_finished:
            return
        folder = checkpoints[-1]
        try:
            state = json.loads((folder / "trainer.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{folder} is damaged: {error}. Delete it to go on from the checkpoint before it."
            ) from None
        self.model.load_state_dict(load_transcoder(CrossLayerTranscoder, folder, self.device).state_dict())
        tensors = read_tensors(folder / "trainer.safetensors")
        moments = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
        restore_optimizer(self.optimizer, self.model, moments)
        self.dead.silent_for.copy_(tensors["dead/silent_for"])
        torch.set_rng_state(tensors["rng/torch"])
        self.step, self.tokens_seen, self.seconds = state["step"], state["tokens_seen"], state["seconds"]
        self.store.load_state_dict(state["store"])


def first_tokens(store: BaseActivationStore, n_tokens: int) -> ActivationBatch:
    """The next few batches of a store, which is then put back to where it was."""
    state = store.state_dict()
    batches: list[ActivationBatch] = []
    while sum(batch.n_tokens for batch in batches) < n_tokens:
        batches.append(next(store))
    store.load_state_dict(state)
    return ActivationBatch(
        inputs=torch.cat([batch.inputs for batch in batches], 1),
        targets=torch.cat([batch.targets for batch in batches], 1),
        kind=torch.cat([batch.kind for batch in batches]),
        sample=torch.cat([batch.sample for batch in batches]),
        position=torch.cat([batch.position for batch in batches]),
    )


def data_fingerprint(store: BaseActivationStore) -> str:
    """A short name for the values of a data set: a hash of its statistics."""
    digest = hashlib.sha256()
    for side in (store.statistics.inputs, store.statistics.targets):
        for part in (side.mean, side.std):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
