"""From TopK or BatchTopK to JumpReLU: one fixed threshold per feature instead of a choice among features.

Ways to the thresholds. *running*: BatchTopK's own inference threshold, which is the same function, exactly. *cut*: one
cut per layer on what the family ranks by, at which as many features fire as its own choice keeps. *adapt*: the same
after some training steps with such a cut, which TopK's weights are not made for.
*estimate* (crosslayer-coding v1): the smallest kept activation of each batch, averaged over batches. Either may then be
*calibrated*: one scale per layer, so that L0 per layer on some tokens is the original's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from clt.config import TrainingConfig
from clt.errors import ConfigError, TrainingError
from clt.models import CrossLayerTranscoder
from clt.progress import watched
from clt.training.evaluator import Evaluation
from clt.training.step import Engine
from clt.types import ActivationBatch

_SMALLEST = 1e-6


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The bisection for one scale per layer."""

    tolerance: float = 0.5
    """Accepted difference in L0 per layer."""
    min_scale: float = 0.1
    max_scale: float = 10.0
    """Where the scale is looked for."""
    max_iterations: int = 15


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The training steps of *adapt*."""

    steps: int = 200
    learning_rate: float | None = None
    """Falls linearly to zero; None: 2e-4 / sqrt(features per layer / 2^14), as in training."""


@dataclass(frozen=True)
class Drift:
    """What conversion changed on tokens that it has not used."""

    before: Evaluation
    after: Evaluation
    scales: list[float] = field(default_factory=list)
    """One per layer; empty without calibration."""
    method: str = "estimate"
    """How thresholds were found; `adapt` changed the weights too."""

    @property
    def l0(self) -> float:
        """Largest change of a layer's L0."""
        pairs = zip(self.before.l0_per_layer, self.after.l0_per_layer, strict=True)
        return max(abs(new - old) for old, new in pairs)

    @property
    def nmse(self) -> float:
        """Relative change of the NMSE."""
        return self.after.nmse / max(self.before.nmse, 1e-12) - 1

    def require_small(self, l0_tolerance: float, nmse_tolerance: float) -> None:
        """Refuse a conversion that is not the same transcoder any more.

        Raises:
            TrainingError: naming both drifts.
        """
        if self.l0 <= l0_tolerance and self.nmse <= nmse_tolerance:
            return
        raise TrainingError(
            f"The converted transcoder drifts: L0 of a layer by {self.l0:.2f} (tolerance {l0_tolerance}), NMSE "
            f"{self.before.nmse:.4f} -> {self.after.nmse:.4f}, {self.nmse:+.1%} (tolerance {nmse_tolerance:.0%}), on "
            f"{self.after.n_tokens:,} tokens not used for conversion.\nAdapt longer (--adaptation.steps), estimate on "
            "more batches, calibrate, or accept it with --force."
        )


@torch.no_grad()
def estimate_thresholds(
    model: CrossLayerTranscoder, batches: Iterable[ActivationBatch], default: float, scale: float = 1.0
) -> Float[Tensor, "layer feature"]:
    """Mean over batches of the smallest activation that training's choice keeps; `default` where a feature never fired.

    Source: crosslayer-coding v1, `convert_batchtopk_to_jumprelu.py`.
    """
    total = torch.zeros(model.config.num_layers, model.config.num_features, device=model.b_dec.device)
    count = torch.zeros_like(total)
    running = model.running_threshold.clone()
    for batch in batches:
        forward = model.forward_training(batch.to(model.b_dec.device).inputs)
        for layer, code in enumerate(forward.codes):
            values = code.dense().float()
            smallest = values.masked_fill(values <= 0, torch.inf).amin(0)
            fired = smallest.isfinite()
            total[layer] += smallest.where(fired, 0.0)
            count[layer] += fired
    # The choice in training form moves it; a transcoder of another project has none yet, and keeps this one.
    model.running_threshold.copy_(torch.where(running > 0, running, model.running_threshold))
    theta = torch.where(count > 0, total / count.clamp_min(1) * scale, default)
    return theta.clamp_min(_SMALLEST)


@torch.no_grad()
def kept_per_layer(model: CrossLayerTranscoder, batches: Iterable[ActivationBatch]) -> list[int]:
    """How many features each layer has on at inference, over all tokens of these batches."""
    total = torch.zeros(model.config.num_layers, dtype=torch.int64, device=model.b_dec.device)
    for batch in batches:
        total += (model.encode(batch.inputs.to(total.device)) > 0).sum((1, 2))
    return total.tolist()


@torch.no_grad()
def common_cut(
    model: CrossLayerTranscoder, batches: Sequence[ActivationBatch], kept: Sequence[int]
) -> Float[Tensor, "layer feature"]:
    """The thresholds that one cut per layer on the scores implies, with `kept` features of a layer on in all.

    TopK ranks a token's features by their scores, so a feature that just makes it on one token and one that just makes
    it on another have about the same score, however different their activations: the cut keeps what the ranking keeps.
    """
    rows = []
    for layer in range(model.config.num_layers):
        scores = [model.scores(layer, h).flatten() for h in _preactivations(model, batches, layer)]
        cut = torch.cat(scores).topk(max(kept[layer], 1)).values[-1].float()
        norm = model.decoder_norm(layer).float().clamp_min(1e-12)
        rows.append(cut / norm if model.config.ranking == "norm" else cut.expand_as(norm))
    return torch.stack(rows).clamp_min(_SMALLEST)


def adapt(
    model: CrossLayerTranscoder, batches: Iterable[ActivationBatch], l0: float, adaptation: Adaptation
) -> CrossLayerTranscoder:
    """The transcoder as BatchTopK of the same L0, trained on for a while: used to a cut that all tokens share.

    TopK gives easy tokens as many features as hard ones, and its weights rely on it; no fixed threshold does that, so
    thresholds alone change what it computes. BatchTopK is TopK whose cut lies at the same score on all tokens of a
    batch (Bussmann et al. 2024), which is what a threshold can express.

    Args:
        l0: features per token and layer.
    """
    config = model.config
    scope = config.num_layers if config.topk_mode == "global" else 1
    keeps = {"batchtopk_k": l0 * scope, "batchtopk_mode": config.topk_mode}
    adapted = CrossLayerTranscoder(
        config.replace(activation_fn="batchtopk", topk_k=None, **keeps), device=model.b_dec.device
    )
    adapted.load_state_dict(model.state_dict())
    engine = Engine(
        adapted,
        TrainingConfig(
            training_steps=adaptation.steps,
            learning_rate=adaptation.learning_rate,
            lr_scheduler="linear",
            aux_loss_factor=None,
            preactivation_coef=0.0,
        ),
    )
    none_dead = torch.zeros(config.num_layers, config.num_features, dtype=torch.bool, device=model.b_dec.device)
    for step, batch in enumerate(watched(batches, adaptation.steps, "adapting")):
        engine.step(batch, step, none_dead)
    return adapted


def running_thresholds(model: CrossLayerTranscoder) -> Float[Tensor, "layer feature"]:
    """BatchTopK's threshold at inference, per feature.

    Raises:
        ConfigError: the transcoder is of another family, or its threshold was never set by training.
    """
    if model.config.activation_fn != "batchtopk":
        raise ConfigError(
            f"activation_fn = {model.config.activation_fn!r} keeps no running threshold; only batchtopk does. Give "
            "activations to estimate thresholds from (--method estimate)."
        )
    if not (model.running_threshold > 0).all():
        raise ConfigError("The running threshold is 0: this transcoder was not trained here. Use --method estimate.")
    return torch.stack([model.threshold(layer).float() for layer in range(model.config.num_layers)])


@torch.no_grad()
def as_jumprelu(model: CrossLayerTranscoder, theta: Float[Tensor, "layer feature"]) -> CrossLayerTranscoder:
    """The same weights behind fixed thresholds."""
    config = model.config.replace(activation_fn="jumprelu", topk_k=None, batchtopk_k=None)
    converted = CrossLayerTranscoder(config, device=model.b_dec.device)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("log_threshold")}
    state |= {f"log_threshold.{layer}": row.clamp_min(_SMALLEST).log() for layer, row in enumerate(theta)}
    converted.load_state_dict(state)
    return converted


@torch.no_grad()
def calibrate(
    model: CrossLayerTranscoder,
    theta: Float[Tensor, "layer feature"],
    batches: Sequence[ActivationBatch],
    kept: Sequence[int],
    options: Calibration,
) -> list[float]:
    """One scale per layer at which thresholds scale * theta leave `kept` features on, on these (fixed) tokens."""
    scales = []
    for layer, wanted in enumerate(kept):
        every = torch.cat(list(_preactivations(model, batches, layer)))
        scales.append(_bisect(every, theta[layer], wanted / len(every), options))
    return scales


def _preactivations(model: CrossLayerTranscoder, batches: Sequence[ActivationBatch], layer: int) -> Iterator[Tensor]:
    for batch in batches:
        yield model.preactivation(layer, model.standardise_inputs(layer, batch.inputs[layer].to(model.b_dec.device)))


def _bisect(h: Tensor, theta: Tensor, wanted: float, options: Calibration) -> float:
    """L0 falls as the scale grows; of all scales tried, the one that comes closest."""

    def excess(scale: float) -> float:
        return float((h > scale * theta).sum()) / len(h) - wanted

    low, high = options.min_scale, options.max_scale
    best, best_excess = 1.0, excess(1.0)
    for _ in range(options.max_iterations):
        if abs(best_excess) <= options.tolerance / 10:  # leaves room for what other tokens do
            break
        middle = (low * high) ** 0.5
        found = excess(middle)
        low, high = (middle, high) if found > 0 else (low, middle)
        if abs(found) < abs(best_excess):
            best, best_excess = middle, found
    return best
