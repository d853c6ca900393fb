"""One optimiser step: micro-batches, lower precision, clipping, and what happens when a number is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from clt.config import TrainingConfig
from clt.errors import ConfigError, TrainingError
from clt.models import CrossLayerTranscoder
from clt.parallel.data_shard import micro_parts
from clt.parallel.gradients import of_all_ranks, reduce_gradients
from clt.parallel.mesh import Mesh, mesh_of_one
from clt.parallel.owned import Owned
from clt.training.diagnose import explain_nonfinite
from clt.training.ema import WeightAverage
from clt.training.explicit import ExplicitPass
from clt.training.gradients import forget, put_aside
from clt.training.losses import Losses, LossManager
from clt.training.optim import build_optimizer, clip_gradients, require_streaming, set_learning_rate
from clt.training.route_options import why_plain
from clt.training.routes import RouteChooser
from clt.training.schedules import default_learning_rate, k_factor, learning_rate_factor
from clt.types import ActivationBatch

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Below this loss scale an fp16 overflow is no matter of scale any more.
_SMALLEST_SCALE = 1.0


@dataclass(frozen=True)
class StepResult:
    """What a step computed, for those who count and report."""

    losses: Losses
    gradient_norm: Float[Tensor, ""]
    fired: Integer[Tensor, "layer feature"]
    """On how many tokens of the batch each feature held here was on."""
    n_fired: Shaped[Tensor, ""]
    """How often any feature of the whole dictionary was on."""
    n_tokens: int
    """Of the whole batch, over all ranks."""
    skipped: bool = False
    """The weights were left as they were."""


class _Pass(nn.Module):
    """Forward and losses of one micro-batch as one callable, so that it can be compiled and run in another type."""

    def __init__(self, model: CrossLayerTranscoder, losses: LossManager) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self, batch: ActivationBatch, step: int, dead: Tensor) -> tuple[Losses, Tensor]:
        model = self.model
        targets = model.standardise_targets(batch.targets.transpose(0, 1))
        forward = model.forward_training(batch.inputs, k_factor(self._losses.config, step))
        losses = self._losses.compute(model, forward, batch.inputs, targets, step, dead)
        return losses, torch.stack([code.fired() for code in forward.codes])


class Engine:
    """A transcoder and everything that changes it."""

    def __init__(
        self,
        model: CrossLayerTranscoder,
        config: TrainingConfig,
        mesh: Mesh | None = None,
        shard_optimizer: bool = False,
    ) -> None:
        """Build optimiser, loss scaler and weight average.

        Args:
            model: what to train; the part of a dictionary that is this rank's.
            config: how.
            mesh: the ranks that train together; None: there is only this one.
            shard_optimizer: copies of the dictionary divide the optimiser's state among themselves.

        Raises:
            ConfigError: the optimiser needs a package that is not installed.
        """
        self.model, self.config = model, config
        self.device = model.b_dec.device
        self.mesh = mesh or mesh_of_one(self.device)
        n_features = model.peers.whole.num_features
        self.peak_learning_rate = config.learning_rate or default_learning_rate(n_features)
        self.owned = Owned(model, self.mesh, shard_optimizer)
        self.optimizer = build_optimizer(self.owned.parameters, config, n_features)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.average = None if config.ema_decay is None else WeightAverage(model, config.ema_decay)
        self._squares: list[Tensor] = []
        self._touched = 1.0
        self.n_skipped = 0
        """Steps left out because of a NaN or an infinity."""
        self.losses = LossManager(config)
        self._pass = _Pass(model, self.losses)
        self.routes = self._choose_routes()
        """Chooses between the hand-written ways of a step; None: autograd computes it."""
        if config.torch_compile:
            self._pass.compile()
        self._explicit = None if self.routes is None else ExplicitPass(model, self.losses)

    def _choose_routes(self) -> RouteChooser | None:
        """The hand-written step, unless it is not wanted or does not know an option."""
        config, whole = self.config, self.model.peers.whole
        odd = why_plain(whole, config, self.mesh.tp.size)
        require_streaming(config, odd if self.mesh.is_alone else f"ranks = {self.mesh.size}")
        if config.route == "plain" or (odd is not None and config.route == "auto"):
            return None
        if odd is not None:
            raise ConfigError(
                f"TrainingConfig.route = {config.route!r} does not know {odd}, which only autograd computes. "
                "Use --route auto, or leave that option at its default."
            )
        return RouteChooser(whole, config, self.device)

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, batch: ActivationBatch, step: int, dead: Bool[Tensor, "layer feature"]) -> StepResult:
        """One optimiser step on one batch.

        Raises:
            TrainingError: a loss or a gradient is not finite, more often than `skip_nonfinite_steps` allows.
        """
        before = self.model.running_threshold.clone()
        self._clear_gradients()
        set_learning_rate(self.optimizer, self.peak_learning_rate * learning_rate_factor(self.config, step))
        result = self._accumulate(batch, step, dead)
        if self.config.optimizer_in_backward:
            return self._streamed(result, batch, step)
        self.scaler.unscale_(self.optimizer)
        reduce_gradients(self.model, self.mesh)
        norm = clip_gradients(self.model, self.config.gradient_clip_val, self.mesh)
        result = replace(result, gradient_norm=norm)
        # The one wait for the device of a step: nothing may reach the weights before this is known.
        if not torch.isfinite(result.losses.total + norm):
            return self._skip(result, batch, step, before)
        self.owned.take_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.owned.share()
        if self.average is not None:
            self.average.update()
        return result

    def _clear_gradients(self) -> None:
        """Before a step; the memory of gathered gradients is used again, that of products comes with the product."""
        if self.routes is not None and self.routes.route == "sparse":
            put_aside(self.model.parameters())
        else:
            forget(self.model.parameters())

    def _streamed(self, result: StepResult, batch: ActivationBatch, step: int) -> StepResult:
        """The end of a step whose weights were updated on the way: all that is left is to see that all was well."""
        result = replace(result, gradient_norm=torch.stack(self._squares).sum().sqrt())
        self._squares.clear()
        if not torch.isfinite(result.losses.total + result.gradient_norm):
            raise TrainingError(self._explain(result, batch, step))
        if self.average is not None:
            self.average.update()
        return result

    def _update(self, source: int) -> None:
        """Take the gradients there are, of one source and what came before it, into the weights and free them."""
        there = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        squares = [torch.linalg.vector_norm(parameter.grad).square() for parameter in there]  # pyright: ignore
        self._squares.append(torch.stack(squares).sum())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulate(self, batch: ActivationBatch, step: int, dead: Tensor) -> StepResult:
        """Gradients of the whole batch, a micro-batch at a time."""
        totals: dict[str, Tensor] = {}
        fired = torch.zeros_like(dead, dtype=torch.int64)
        n_tokens = self.mesh.dp.total(batch.n_tokens, "tokens", self.device)
        for part in self._micro_batches(batch, n_tokens):
            losses, on = self._gradients(part.to(self.device), step, dead, part.n_tokens / n_tokens)
            fired += on
            for name in Losses.__dataclass_fields__:
                value = getattr(losses, name).detach()
                totals[name] = totals[name] + value if name in totals else value
        summed, fired, n_fired = of_all_ranks(totals, fired, self.mesh)
        self._observe(n_fired, n_tokens, step)
        losses = Losses(**summed)
        return StepResult(losses, losses.total.new_zeros(()), fired, n_fired, n_tokens)

    def _gradients(self, part: ActivationBatch, step: int, dead: Tensor, share: float) -> tuple[Losses, Tensor]:
        """Add those of a micro-batch; its part of the losses, and on how many tokens each feature was on."""
        if self._explicit is None or self.routes is None:
            losses, on = self._run(part, step, dead)
            losses = _weighted(losses, share, self.config)
            self.scaler.scale(losses.total).backward()
            return losses, on
        streams = self.config.optimizer_in_backward
        result = self._explicit.run(part, step, dead, self.routes.route, share, self._update if streams else None)
        self._touched = result.touched
        return result.losses, result.fired

    def _observe(self, n_fired: Tensor, n_tokens: int, step: int) -> None:
        """Let the density over all ranks decide the next step's route, which is then the same on all of them."""
        if self.routes is None or not self.routes.wants_density(step):
            return
        whole, world = self.model.peers.whole, self.mesh.world
        if not self.routes.chooses_k and not world.is_alone:
            box = torch.tensor([self._touched], dtype=torch.float64, device=self.device)
            self._touched = float(world.sum_(box, "density")) / world.size
        self.routes.observe(float(n_fired) / (n_tokens * whole.num_layers * whole.num_features), self._touched)

    def _micro_batches(self, batch: ActivationBatch, n_tokens: int) -> Iterator[ActivationBatch]:
        """This rank's rows of each micro-batch of the whole batch of `n_tokens`."""
        parts = micro_parts(n_tokens, self.config.micro_batch_tokens, self.mesh.dp.rank, self.mesh.dp.size)
        if len(parts) == 1:
            yield batch
            return
        start = 0
        for part in parts:
            yield _rows(batch, start, start + len(part))
            start += len(part)

    def _run(self, batch: ActivationBatch, step: int, dead: Tensor) -> tuple[Losses, Tensor]:
        with torch.autograd.set_detect_anomaly(self.config.debug_anomaly):
            if self.config.precision == "fp32":
                return self._pass(batch, step, dead)
            half = _HALF[self.config.precision]
            weights = {
                f"model.{name}": value if "log_threshold" in name else value.to(half)
                for name, value in self.model.named_parameters()
            }
            return functional_call(self._pass, weights, (batch, step, dead))

    def _skip(self, result: StepResult, batch: ActivationBatch, step: int, threshold: Tensor) -> StepResult:
        """Leave the step out, or stop the run."""
        overflow = self.scaler.is_enabled() and bool(torch.isfinite(result.losses.total))
        if not (overflow and self.scaler.get_scale() > _SMALLEST_SCALE):
            if self.n_skipped >= self.config.skip_nonfinite_steps:
                raise TrainingError(self._explain(result, batch, step))
            self.n_skipped += 1
        self.scaler.update()  # halves the scale
        self.optimizer.zero_grad(set_to_none=True)
        self.model.running_threshold.copy_(threshold)
        return replace(result, skipped=True)

    def _explain(self, result: StepResult, batch: ActivationBatch, step: int) -> str:
        skipped = f" after {self.n_skipped} skipped steps" if self.n_skipped else ""
        where = explain_nonfinite(self.model, result.losses, batch.to(self.device))
        return (
            f"Step {step}{skipped}: {where} (learning rate {self.peak_learning_rate:.3g}, precision "
            f"{self.config.precision}).\nUsual causes: too high a learning rate, or activations with NaN. The last "
            "checkpoint is untouched; --skip-nonfinite-steps N leaves out up to N such steps."
        )


def _rows(batch: ActivationBatch, start: int, stop: int) -> ActivationBatch:
    return ActivationBatch(
        inputs=batch.inputs[:, start:stop],
        targets=batch.targets[:, start:stop],
        kind=batch.kind[start:stop],
        sample=batch.sample[start:stop],
        position=batch.position[start:stop],
    )


def _weighted(losses: Losses, share: float, config: TrainingConfig) -> Losses:
    """A micro-batch's part of the full batch's losses; what is a sum over tokens is not a mean."""
    if share == 1:
        return losses
    sums = {"sparsity"} if config.sparsity_reduction == "sum_tokens" else set()
    names = Losses.__dataclass_fields__
    return Losses(**{name: getattr(losses, name) * (1 if name in sums else share) for name in names})
