"""What a training step pays for: error, active features, silent features, and what dead ones could have explained.

All are means over tokens, in standardised units; each switch to a seed project's form is named in TrainingConfig.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clt.config import CLTConfig, TrainingConfig
from clt.models import CrossLayerTranscoder
from clt.models.clt import TrainingForward
from clt.models.codes import DenseCodes
from clt.training.schedules import sparsity_weight


@dataclass(frozen=True)
class Losses:
    """The terms of one step, each already weighted; their sum is what is minimised."""

    reconstruction: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    preactivation: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        """What is minimised."""
        return self.reconstruction + self.sparsity + self.preactivation + self.auxiliary


def reconstruction_loss(
    error: Float[Tensor, "token layer d_model"], variance: Float[Tensor, " layer"]
) -> Float[Tensor, ""]:
    """Squared error per token over all dimensions, each target divided by its variance, summed over targets.

    With the variance of the whole data set this is the sum of the targets' NMSE.
    """
    per_target = error.square().sum(2).mean(0)
    return (per_target / variance.clamp_min(1e-12)).sum()


class LossManager:
    """The loss of a training step under one TrainingConfig."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.sparsity_factor = 1.0
        """Multiplies the scheduled sparsity weight; moved by `steered` where there is a target for L0."""

    def compute(
        self,
        model: CrossLayerTranscoder,
        forward: TrainingForward,
        inputs: Float[Tensor, "layer token d_model"],
        targets: Float[Tensor, "token layer d_model"],
        step: int,
        dead: Bool[Tensor, "layer feature"],
    ) -> Losses:
        """All terms of one step.

        Args:
            model: the transcoder that made `forward`.
            forward: its reconstruction, codes and pre-activations.
            inputs: what the MLPs read, in the host's units (for the auxiliary loss).
            targets: what they wrote, standardised.
            step: counted from 0; decides the scheduled weights.
            dead: features that have been silent for the configured number of tokens.
        """
        error = targets - forward.reconstruction.to(targets.dtype)
        zero = error.new_zeros(())
        return Losses(
            self.reconstruction(model, error),
            self._sparsity(model, forward, step) if self.charges(model) else zero,
            self._preactivation(model, forward, dead) if self._pulls(model, dead) else zero,
            self._auxiliary(model, inputs, error.detach(), dead)
            if self._revives(model) and model.peers.any(dead)
            else zero,
        )

    def charges(self, model: CrossLayerTranscoder) -> bool:
        """Whether active features pay."""
        return pays_sparsity(model.config, self.config)

    def _pulls(self, model: CrossLayerTranscoder, dead: Tensor) -> bool:
        """Whether silent features are pulled back: jumprelu's all the time, topk's and batchtopk's once dead."""
        fn = model.config.activation_fn
        return fn == "jumprelu" or (fn != "relu" and bool(dead.any()))

    def _revives(self, model: CrossLayerTranscoder) -> bool:
        return self.config.aux_loss_factor is not None and model.config.activation_fn in ("topk", "batchtopk")

    def reconstruction(self, model: CrossLayerTranscoder, error: Tensor) -> Tensor:
        """Squared error in the configured normalisation."""
        if self.config.loss_normalisation == "variance":
            return reconstruction_loss(error, model.target_variance)
        return (error / model.target_scale).square().mean(dim=(0, 2)).sum()

    def _sparsity(self, model: CrossLayerTranscoder, forward: TrainingForward, step: int) -> Tensor:
        """λ Σ tanh(c · norm · activation): about λ for each feature that is clearly on (Ameisen et al. 2025).

        The decoder norm, through which gradient flows, closes a loophole: halving an activation while doubling its
        decoder changes neither the output nor the price.
        """
        steepness, span = self.config.sparsity_c, self.config.sparsity_span_penalty
        price = sum_of(code.price(model.decoder_norm(s), steepness) for s, code in enumerate(forward.codes))
        if span > 0 and model.config.first_target + model.config.span > 1:
            price = price + span * span_price(model, forward, steepness)
        if self.config.sparsity_reduction == "mean_tokens":
            price = price / len(forward.reconstruction)
        return sparsity_weight(self.config, step) * self.sparsity_factor * price

    def _preactivation(self, model: CrossLayerTranscoder, forward: TrainingForward, dead: Tensor) -> Tensor:
        """Pulls silent features towards their threshold (Anthropic, January 2025), so that they do not stay dead.

        In topk and batchtopk only dead features are pulled. One whose pre-activation is negative on every token gets
        no gradient from AuxK either, whose reconstruction is rectified; this is what brings it back.
        """
        layers = range(model.config.num_layers)
        h = forward.preactivations
        if self.config.preactivation_form == "negative":
            n_pairs = len(h) * len(h[0]) * model.peers.whole.num_features
            return self.config.preactivation_coef * sum_of((-h[layer]).relu().sum() for layer in layers) / n_pairs
        if model.config.activation_fn in ("topk", "batchtopk"):
            names = [dead[layer].nonzero()[:, 0] for layer in layers]
            pull = sum_of(
                ((-h[layer][:, names[layer]]).relu() * model.decoder_norm(layer)[names[layer]]).sum()
                for layer in layers
            )
            return self.config.preactivation_coef * pull / len(h[0])
        cost = sum_of(
            ((model.threshold(layer) - h[layer]).relu() * model.decoder_norm(layer)).sum() for layer in layers
        )
        return self.config.preactivation_coef * cost / len(h[0])

    def _auxiliary(self, model: CrossLayerTranscoder, inputs: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """AuxK: the dead features' best k reconstruct what is left over, on all targets (Gao et al. 2024, A.2)."""
        config = model.config
        wanted = self.config.aux_k or min(512, max(1, config.d_model // 2))
        names, h = [dead[layer].nonzero()[:, 0] for layer in range(config.num_layers)], []
        for layer, chosen in enumerate(names):
            weight = model.W_enc[layer][chosen]
            x = model.standardise_inputs(layer, inputs[layer]).to(weight.dtype)
            h.append(torch.addmm(model.b_enc[layer][chosen], x, weight.T))
        best = model.peers.best(h, [each.detach() for each in h], wanted)
        parts = [model.decoders.part(i, DenseCodes(code.dense()), names[i]) for i, code in enumerate(best)]
        left_over = error - model.peers.sum(model.add_windows(parts)).to(error.dtype)
        return (self.config.aux_loss_factor or 0.0) * self.reconstruction(model, left_over)


def pays_sparsity(model: CLTConfig, training: TrainingConfig) -> bool:
    """Whether the loss has a sparsity penalty: topk's number of features is fixed, batchtopk's unless asked for."""
    fn = model.activation_fn
    paying = fn in ("relu", "jumprelu") or (fn == "batchtopk" and training.apply_sparsity_penalty_to_batchtopk)
    return paying and training.sparsity_lambda > 0


def span_price(model: CrossLayerTranscoder, forward: TrainingForward, steepness: float) -> Float[Tensor, ""]:
    """Σ distance · tanh(c · norm of the decoder for that target · activation), over tokens, features and targets.

    A feature that clearly writes to a layer d further on pays d for it, on top of what it pays for being on: writing
    far is left to features that need it. (Lange et al. 2026: cross-layer transcoders gain by skipping over the steps
    that the host takes one after the other.)
    """
    return sum_of(
        (target - source) * code.price(norm, steepness)
        for source, code in enumerate(forward.codes)
        for target, norm in zip(model.config.targets_of(source), model.decoder_norms(source))
    )


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Sum of scalar tensors as a tensor (Python's `sum` would start from an int)."""
    return torch.stack(list(terms)).sum()
