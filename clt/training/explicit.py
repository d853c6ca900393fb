"""Losses and all gradients of a batch without autograd: encoder once, one source at a time, nothing kept per pair.

The terms are those of losses.py, the activations those of clt/models; tests hold both equal to autograd's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from clt.models import CrossLayerTranscoder
from clt.models.kernels.gate import GateGradients, GateTerms
from clt.models.kernels.sparse import keep_above
from clt.training.dead_terms import DeadTerms
from clt.training.gradients import add
from clt.training.keeping import keep
from clt.training.losses import Losses, LossManager
from clt.training.route_options import Route
from clt.training.schedules import k_factor, sparsity_weight
from clt.training.sources import EntrySource, GateSource, KeptMatrix, Source, Work
from clt.types import ActivationBatch

# Tokens from which the density of what gets a gradient is estimated while nothing counts it.
_SAMPLE = 64


@dataclass(frozen=True)
class PassResult:
    """What a pass found; its gradients are at the parameters."""

    losses: Losses
    fired: Integer[Tensor, "layer feature"]
    touched: float
    """Share of (token, feature) pairs that are on or get a gradient nevertheless; 1 where it was not counted."""


class ExplicitPass:
    """Forward and backward of a micro-batch, by hand."""

    def __init__(self, model: CrossLayerTranscoder, losses: LossManager) -> None:
        self._model, self._losses, self._config = model, losses, losses.config
        config = losses.config
        self._dtype = torch.bfloat16 if config.precision == "bf16" else None

    @torch.no_grad()
    def run(
        self,
        batch: ActivationBatch,
        step: int,
        dead: Bool[Tensor, "layer feature"],
        route: Route,
        share: float = 1.0,
        when_done: Callable[[int], None] | None = None,
    ) -> PassResult:
        """Add the gradients of a micro-batch to those of its step.

        Args:
            batch: the tokens.
            step: decides the scheduled weights.
            dead: features that have been silent for long.
            route: dense, mixed or sparse.
            share: weight of this micro-batch.
            when_done: called with each source whose gradients are complete.
        """
        model = self._model
        work = self._work(batch, step, share)
        fired = torch.zeros_like(dead, dtype=torch.int64)
        sources, touched = self._sources(work, step, route, fired)
        total = self._error(sources, batch)
        flat = total.flatten(1)
        terms = self._dead_terms(dead)
        pull, auxiliary = (total.new_zeros(()) for _ in range(2))
        if terms is not None:
            pull, auxiliary = terms.compute(batch.inputs, -total, share)
        reconstruction = self._error_to_gradient(total, share)
        add(model.b_dec, total.sum(0))
        sums: list[GateGradients] = []
        for index in reversed(range(len(sources))):
            sums.append(sources.pop().backward(flat))
            if terms is not None:
                terms.add_gradients(index)
            if when_done is not None:
                when_done(index)
        price, silent = self._penalties(work, sums[::-1])
        return PassResult(Losses(reconstruction, price, pull + silent, auxiliary), fired, touched)

    # --- before -----------------------------------------------------------------------------------------------

    def _work(self, batch: ActivationBatch, step: int, share: float) -> Work:
        model, terms = self._model, self._terms(batch, step, share)
        ranks = model.config.activation_fn in ("topk", "batchtopk") and model.config.ranking == "norm"
        layers = range(model.config.num_layers)
        norms = [model.decoder_norm(s).detach() if ranks or terms.price or terms.pull else None for s in layers]
        dtype = self._dtype or model.b_dec.dtype
        return Work(model, batch.inputs, dtype, terms, norms)

    def _terms(self, batch: ActivationBatch, step: int, share: float) -> GateTerms:
        """The penalties, with all their weights."""
        model, config = self._model.config, self._config
        price = pull = 0.0
        if self._losses.charges(self._model):
            per_token = config.sparsity_reduction == "mean_tokens"
            price = sparsity_weight(config, step) * self._losses.sparsity_factor
            price *= share / batch.n_tokens if per_token else 1.0
        is_negative = config.preactivation_form == "negative"
        if model.activation_fn == "jumprelu":
            pull = share * config.preactivation_coef / batch.n_tokens
            if is_negative:
                pull /= model.num_layers * self._model.peers.whole.num_features
        return GateTerms(
            price=price,
            steepness=config.sparsity_c,
            pull=pull,
            negative=is_negative,
            bandwidth=model.jumprelu_bandwidth if model.activation_fn == "jumprelu" else 0.0,
            height_is_h=model.jumprelu_gradient == "h",
            reaches_h=model.jumprelu_reach == "all",
        )

    def _sources(self, work: Work, step: int, route: Route, fired: Tensor) -> tuple[list[Source], float]:
        """Every layer, encoded."""
        layers = range(work.model.config.num_layers)
        if work.model.config.activation_fn in ("topk", "batchtopk"):
            ranking = work.norms if work.model.config.ranking == "norm" else [None] * len(layers)
            kept = keep(work.model, work, ranking, k_factor(self._config, step))
            if route == "dense":
                return [KeptMatrix(work, s, kept[s], fired[s]) for s in layers], 1.0
            return [EntrySource(work, s, kept[s], fired[s], None) for s in layers], 1.0
        if route != "sparse":
            recomputes = self._config.recompute_encoder
            gates = [GateSource(work, s, fired[s], route == "mixed", recomputes) for s in layers]
            return list(gates), self._estimate(work) if route == "mixed" else 1.0
        entries = [self._entries(work, s, fired[s]) for s in layers]
        n_pairs = len(layers) * fired.shape[1] * work.inputs.shape[1]
        return list(entries), sum(entry.n_entries for entry in entries) / n_pairs

    def _entries(self, work: Work, source: int, fired: Tensor) -> EntrySource:
        """relu or jumprelu: what is on, and what else has a gradient of its own."""
        terms, theta = work.terms, work.theta(source)
        h = work.preactivation(source)
        kept = keep_above(h, None, _reach(terms, theta))[0]
        gaps = None
        if terms.pull:
            wide = h.to(theta.dtype)
            gaps = (wide.neg() if terms.negative else theta - wide).relu_().sum(0)
        return EntrySource(work, source, kept, fired, gaps)

    def _estimate(self, work: Work) -> float:
        """From some tokens, how many pairs the sparse route would have to look at."""
        some = Work(work.model, work.inputs[:, :_SAMPLE], work.dtype, work.terms, work.norms)
        layers = range(work.model.config.num_layers)
        shares = [(some.preactivation(s) > _reach(work.terms, work.theta(s))).float().mean() for s in layers]
        return float(torch.stack(shares).mean())

    def _dead_terms(self, dead: Tensor) -> DeadTerms | None:
        has_them = self._model.config.activation_fn in ("topk", "batchtopk") and bool(dead.any())
        return DeadTerms(self._model, self._losses, dead) if has_them else None

    # --- error and losses -------------------------------------------------------------------------------------

    def _error(self, sources: list[Source], batch: ActivationBatch) -> Float[Tensor, "token layer d_model"]:
        """Prediction less target, standardised; with parts of the dictionary elsewhere, the sum over all parts."""
        start, peers = self._minus_targets(batch), self._model.peers
        total = torch.zeros_like(start) if peers.is_split else start
        for source in sources:
            source.add_decoded(total.flatten(1))
        return peers.sum(total).add_(start) if peers.is_split else total

    def _minus_targets(self, batch: ActivationBatch) -> Float[Tensor, "token layer d_model"]:
        """b_dec - y, to which the sources then add: it becomes the error without a further matrix."""
        model = self._model
        shape = batch.n_tokens, *model.b_dec.shape
        total = model.b_dec.new_empty(shape, dtype=torch.promote_types(model.b_dec.dtype, torch.float32))
        total.copy_(batch.targets.transpose(0, 1))
        return total.sub_(model.target_shift).mul_(-model.target_scale).add_(model.b_dec)

    def _error_to_gradient(self, error: Float[Tensor, "token layer d_model"], share: float) -> Tensor:
        """The reconstruction loss; the error becomes the loss's gradient."""
        model, n_tokens = self._model, len(error)
        if self._config.loss_normalisation == "variance":
            weight = share / (model.target_variance.to(error.dtype).clamp_min(1e-12) * n_tokens)
            # Over one axis first: a sum of millions of squares in fp32 would lose the fourth digit.
            loss = (torch.linalg.vector_norm(error, dim=2).square().sum(0) * weight).sum()
            error.mul_(2 * weight[:, None])
            return loss
        weight = share / (model.target_scale.to(error.dtype).square() * n_tokens * error.shape[2])
        loss = (error.square() * weight).sum()
        error.mul_(2 * weight)
        return loss

    def _penalties(self, work: Work, sums: list[GateGradients]) -> tuple[Tensor, Tensor]:
        """Sparsity and pre-activation penalty."""
        terms = work.terms
        price = terms.price * torch.stack([each.price.sum() for each in sums]).sum()
        weights = [1.0 if terms.negative else work.norm(source) for source in range(len(sums))]
        silent = terms.pull * torch.stack([(each.pull * by).sum() for each, by in zip(sums, weights)]).sum()
        dtype = self._model.b_dec.dtype
        return price.to(dtype), silent.to(dtype)


def _reach(terms: GateTerms, theta: Float[Tensor, " feature"]) -> Float[Tensor, " feature"]:
    """What h must exceed for a pair to need looking at: the threshold, less half the straight-through window."""
    lowest = theta - terms.bandwidth / 2
    return lowest.clamp_max(0.0) if terms.negative else lowest
