"""Training a transcoder further on what the host with it in place predicts.

A transcoder is trained layer by layer on the host's own activations; in place, its errors add up and reach inputs that
it has never seen. A few hundred steps on the replacement model's logits repair much of that. Reconstruction stays in
the loss, so that the features go on describing the host. Source of the terms: EleutherAI clt-training (`kl`, `kl-fvu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from clt.config import TrainingConfig
from clt.config.base import Config, require_one_of, require_positive
from clt.errors import ConfigError, HostModelError, TrainingError
from clt.models import CrossLayerTranscoder
from clt.models.checkpoint import load_transcoder, read_tensors, save_tensors, save_transcoder
from clt.progress import progress_bar
from clt.replacement.model import ReplacementModel
from clt.replacement.scores import Scored, scored_positions
from clt.training.interrupts import Interrupts
from clt.training.losses import LossManager
from clt.training.optim import build_optimizer, optimizer_tensors, restore_optimizer, set_learning_rate
from clt.training.run_folder import METRICS, RunFolder, step_of
from clt.training.schedules import learning_rate_factor
from clt.training.trackers import JSONLTracker
from clt.types import Sample

_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Config):
    """How a transcoder is trained through the replacement model."""

    loss: Literal["kl", "ce"] = "kl"
    """What the logits pay: KL divergence from the host's, or cross-entropy of the text's next token."""
    steps: int = 200
    """Optimiser steps."""
    rows: int = 16
    """Samples per step."""
    learning_rate: float = 3e-4
    """At the first step; falls linearly to zero."""
    reconstruction_weight: float = 1.0
    """Weight of the reconstruction loss of training, on the host's own activations; 0: logits alone."""
    sparsity_lambda: float = 0.0
    """Weight of the sparsity penalty of training (relu and jumprelu), which keeps L0 from growing."""
    sparsity_c: float = 4.0
    """Steepness of its tanh."""
    gradient_clip_val: float | None = 1.0
    """Largest allowed norm of the whole gradient; None: no limit."""
    checkpoint_interval: int = 100
    """Steps between checkpoints."""
    seed: int = 42
    """Seed of the order of the samples."""

    def __post_init__(self) -> None:
        require_positive(
            "finetune", steps=self.steps, rows=self.rows, learning_rate=self.learning_rate,
            sparsity_c=self.sparsity_c, gradient_clip_val=self.gradient_clip_val,
            checkpoint_interval=self.checkpoint_interval,
        )  # fmt: skip
        require_one_of("finetune", "loss", self.loss, ("kl", "ce"))
        for name in ("reconstruction_weight", "sparsity_lambda"):
            if getattr(self, name) < 0:
                raise ConfigError(f"finetune.{name} = {getattr(self, name)} must be 0 or more.")

    def training(self) -> TrainingConfig:
        """The same as the trainer's parts understand it."""
        return TrainingConfig(
            training_steps=self.steps,
            learning_rate=self.learning_rate,
            lr_scheduler="linear",
            sparsity_lambda=self.sparsity_lambda,
            sparsity_lambda_schedule="constant",
            sparsity_c=self.sparsity_c,
            preactivation_coef=0.0,
            aux_loss_factor=None,
        )


def end_to_end_loss(
    kind: Literal["kl", "ce"],
    host: Float[Tensor, "token vocabulary"],
    ours: Float[Tensor, "token vocabulary"],
    following: Integer[Tensor, " token"],
) -> Float[Tensor, ""]:
    """KL(host || replacement), or cross-entropy of the tokens that follow; nats, mean over positions."""
    ours = ours.float().log_softmax(1)
    if kind == "ce":
        return torch.nn.functional.nll_loss(ours, following)
    theirs = host.float().log_softmax(1)
    return torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class Finetuner:
    """One such run, in a folder in which it can stop and go on exactly."""

    def __init__(
        self,
        replacement: ReplacementModel,
        samples: Sequence[Sample],
        config: FinetuneConfig,
        folder: str | Path,
        details: dict[str, Any] | None = None,
    ) -> None:
        """Build the optimiser, or restore an unfinished run of the folder.

        Args:
            replacement: host and the transcoder to train, which is changed in place.
            samples: texts (or pictures and answers); tokens of the answer, or of the text, are predicted.
            folder: for checkpoints and the result.
            details: recorded in run.json, and compared when the run goes on.

        Raises:
            HostModelError: there are no samples.
            ConfigError: the transcoder is none of ours, or the folder holds a run with other options.
        """
        if not samples:
            raise HostModelError("There are no samples to fine-tune on.")
        if not isinstance(replacement.transcoder, CrossLayerTranscoder):
            raise ConfigError(f"{type(replacement.transcoder).__name__} cannot be trained; a CrossLayerTranscoder can.")
        self.replacement, self.model = replacement, replacement.transcoder
        self.config, self.samples = config, samples
        self.training = config.training()
        self.losses = LossManager(self.training)
        self._named = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self._named, self.training, self.model.config.num_features)
        self.folder = RunFolder(folder)
        self.step = 0
        self.folder.begin({**config.to_dict(), **(details or {})}, {"n_samples": len(samples)})
        self._restore()

    def train(self) -> CrossLayerTranscoder:
        """Run to the last step, save, and return the transcoder; Ctrl-C writes a checkpoint first."""
        tracker = JSONLTracker(self.folder.path / METRICS, self.step)
        bar = progress_bar(self.config.steps, "fine-tuning", initial=self.step)
        try:
            with Interrupts() as interrupts:
                while self.step < self.config.steps:
                    values = self._one_step()
                    tracker.log(self.step, values)
                    bar.update()
                    bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
                    if interrupts.requested or self.step % self.config.checkpoint_interval == 0:
                        self._save()
                    if interrupts.requested:
                        raise KeyboardInterrupt
        finally:
            tracker.close()
            bar.close()
        save_transcoder(self.model, self.folder.path)
        self.folder.finish({"steps": self.step})
        return self.model

    def batch(self, step: int) -> list[Sample]:
        """The samples of a step, a function of the seed: every sample once per epoch, in another order each."""
        rows = min(self.config.rows, len(self.samples))
        epoch, place = divmod(step, len(self.samples) // rows)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        return [self.samples[index] for index in order[place * rows : (place + 1) * rows]]

    def _one_step(self) -> dict[str, float]:
        config = self.config
        terms = self._terms(self.batch(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        limit = config.gradient_clip_val or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not torch.isfinite(total + norm):
            parts = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
            raise TrainingError(
                f"Step {self.step}: the loss or its gradient is not finite ({parts}; gradient norm {float(norm):.4g}). "
                "The last checkpoint is untouched. Lower --learning-rate."
            )
        set_learning_rate(self.optimizer, config.learning_rate * learning_rate_factor(self.training, self.step))
        self.optimizer.step()
        self.step += 1
        return {name: float(value.detach()) for name, value in terms.items()}

    def _terms(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The terms of the loss, weighted."""
        adapter, config = self.replacement.adapter, self.config
        inputs = adapter.prepare(samples)
        scored: Scored = scored_positions(inputs)
        with adapter.capturing(inputs.is_token) as captured:
            host = adapter.logits(inputs)[scored.where]
        with self.replacement.active(inputs):
            ours = adapter.logits(inputs, gradient=True)[scored.where]
        terms = {config.loss: end_to_end_loss(config.loss, host, ours, scored.following)}
        if config.reconstruction_weight or config.sparsity_lambda:
            model = self.model
            device = model.b_dec.device
            read, written = captured.inputs.float().to(device), captured.targets.float().to(device)
            targets = model.standardise_targets(written.transpose(0, 1))
            dead = torch.zeros(read.shape[0], model.config.num_features, dtype=torch.bool, device=device)
            own = self.losses.compute(model, model.forward_training(read), read, targets, self.step, dead)
            terms["reconstruction"] = config.reconstruction_weight * own.reconstruction
            terms["sparsity"] = own.sparsity
        return {name: value.to(self.model.b_dec.device) for name, value in terms.items()}

    def _save(self) -> None:
        with self.folder.new_checkpoint(self.step) as folder:
            save_transcoder(self.model, folder)
            save_tensors(optimizer_tensors(self.optimizer, self._named), folder / _OPTIMIZER)
        self.folder.keep_only({self.step})

    def _restore(self) -> None:
        self.folder.clean_up()
        checkpoints = self.folder.checkpoints()
        if self.folder.is_finished or not checkpoints:
            return
        device = self.model.b_dec.device
        self.model.load_state_dict(load_transcoder(CrossLayerTranscoder, checkpoints[-1], device).state_dict())
        restore_optimizer(self.optimizer, self._named, read_tensors(checkpoints[-1] / _OPTIMIZER))
        self.step = step_of(checkpoints[-1])
