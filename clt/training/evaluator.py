"""How good a transcoder is on activations it has not seen; every name is defined in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from clt.errors import DatasetError
from clt.models import CrossLayerTranscoder
from clt.training.by_distance import DistanceErrors
from clt.training.memory import EVALUATION_TOKENS
from clt.types import ActivationBatch, TokenKind


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one transcoder on one set of held-out tokens."""

    n_tokens: int
    nmse_per_layer: list[float]
    l0_per_layer: list[float]
    dead_per_layer: list[int]
    features_per_layer: int
    nmse_per_kind: dict[str, list[float]]
    tokens_per_kind: dict[str, int]
    seed_nmse_per_layer: list[float]
    """crosslayer-coding's: mean over dimensions of each dimension's own ratio."""
    seed_explained_variance_per_layer: list[float]
    """crosslayer-coding's: 1 - variance of the error / variance of the target, so that a constant error is free."""
    nmse_within_distance: dict[str, list[float]]
    """By largest distance from source to target that is used, NMSE per layer; empty if not asked for."""
    density: Float[Tensor, "layer feature"]

    @property
    def nmse(self) -> float:
        """Mean of the layers' NMSE."""
        return sum(self.nmse_per_layer) / len(self.nmse_per_layer)

    @property
    def explained_variance(self) -> float:
        """1 - NMSE."""
        return 1 - self.nmse

    @property
    def l0(self) -> float:
        """Active features per token and layer, averaged over layers."""
        return sum(self.l0_per_layer) / len(self.l0_per_layer)

    @property
    def dead_share(self) -> float:
        """Share of all features that fired on none of the held-out tokens."""
        return sum(self.dead_per_layer) / (self.features_per_layer * len(self.dead_per_layer))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the density per feature becomes a histogram per layer."""
        return {
            "n_tokens": self.n_tokens,
            "nmse": self.nmse,
            "explained_variance": self.explained_variance,
            "l0": self.l0,
            "l0_total": sum(self.l0_per_layer),
            "dead_share": self.dead_share,
            "features_per_layer": self.features_per_layer,
            "nmse_per_layer": self.nmse_per_layer,
            "explained_variance_per_layer": [1 - value for value in self.nmse_per_layer],
            "l0_per_layer": self.l0_per_layer,
            "dead_per_layer": self.dead_per_layer,
            "nmse_per_kind": self.nmse_per_kind,
            "tokens_per_kind": self.tokens_per_kind,
            "seed_nmse": _mean(self.seed_nmse_per_layer),
            "seed_nmse_per_layer": self.seed_nmse_per_layer,
            "seed_explained_variance": _mean(self.seed_explained_variance_per_layer),
            "nmse_within_distance": self.nmse_within_distance,
            "density_histogram": density_histogram(self.density),
        }


def density_histogram(density: Float[Tensor, "layer feature"]) -> dict[str, Any]:
    """Features by log10 of the share of tokens they fire on, and those that never fire, per layer."""
    edges = torch.linspace(-7, 0, 29)
    logs = density.clamp_min(1e-7).log10()
    counts = [torch.histogram(row[share > 0], edges).hist.int().tolist() for row, share in zip(logs, density)]
    return {"log10_edges": edges.tolist(), "features": counts, "silent": (density == 0).sum(1).tolist()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class CLTEvaluator:
    """Accumulates exact sums over batches, so the batch size changes nothing."""

    def __init__(
        self, model: CrossLayerTranscoder, device: torch.device | str | None = None, by_distance: bool = False
    ) -> None:
        """Start with nothing counted; `by_distance` also measures with near sources only, at several times the cost."""
        self.model = model
        self.device = device or model.b_dec.device
        layers, width = model.config.num_layers, model.config.d_model
        self._distances = DistanceErrors(model) if by_distance else None
        like = {"dtype": torch.float64, "device": self.device}
        kinds = len(TokenKind)
        self._squared_error = torch.zeros(kinds, layers, width, **like)
        self._sum = torch.zeros(kinds, layers, width, **like)
        self._square = torch.zeros(kinds, layers, width, **like)
        self._error_sum = torch.zeros(layers, width, **like)
        self._count = torch.zeros(kinds, **like)
        self._fired = torch.zeros(layers, model.config.num_features, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def add(self, batch: ActivationBatch) -> None:
        """Count one batch, some tokens at a time, since activations of all layers are matrices here."""
        for part in torch.arange(batch.n_tokens).split(EVALUATION_TOKENS):
            self._add(batch if len(part) == batch.n_tokens else batch.select(part))

    def _add(self, batch: ActivationBatch) -> None:
        batch = batch.to(self.device)
        features = self.model.encode(batch.inputs)
        prediction = self.model.decode(features, batch.inputs)
        targets = batch.targets.double()
        error = targets - prediction.double()
        is_kind = torch.stack([batch.kind == kind for kind in TokenKind]).double()
        self._count += is_kind.sum(1)
        self._fired += (features > 0).sum(1)
        self._error_sum += error.sum(1)
        for total, values in (
            (self._squared_error, error.square()),
            (self._sum, targets),
            (self._square, targets.square()),
        ):
            total += torch.einsum("kt,ltd->kld", is_kind, values)
        if self._distances is not None:
            self._distances.add(features, prediction, batch.targets)

    def result(self) -> Evaluation:
        """Metrics over everything added.

        Raises:
            DatasetError: nothing was added.
        """
        count = self._count.long().tolist()
        n_tokens = sum(count)
        if n_tokens == 0:
            raise DatasetError("There is no held-out token to evaluate on. Capture some with --held-out-fraction 0.1.")
        density = self.model.peers.join(self._fired).cpu() / n_tokens
        every = torch.arange(len(TokenKind))
        seed_nmse, seed_ev = self._seed_metrics(n_tokens)
        return Evaluation(
            n_tokens=n_tokens,
            nmse_per_layer=self._nmse(every),
            l0_per_layer=density.sum(1).tolist(),
            dead_per_layer=(density == 0).sum(1).tolist(),
            features_per_layer=self.model.peers.whole.num_features,
            nmse_per_kind={k.name.lower(): self._nmse(torch.tensor([k.value])) for k in TokenKind if count[k] > 1},
            tokens_per_kind={kind.name.lower(): count[kind] for kind in TokenKind},
            seed_nmse_per_layer=seed_nmse,
            seed_explained_variance_per_layer=seed_ev,
            nmse_within_distance=self._distances.nmse(self._spread(every).sum(1)) if self._distances else {},
            density=density.float(),
        )

    def _spread(self, kinds: Integer[Tensor, " kind"]) -> Float[Tensor, "layer d_model"]:
        """Σ(y - mean y)² over these kinds' tokens."""
        kinds = kinds.to(self._count.device)
        spread = self._square[kinds].sum(0) - self._sum[kinds].sum(0).square() / self._count[kinds].sum()
        return spread.clamp_min(0).cpu()

    def _nmse(self, kinds: Integer[Tensor, " kind"]) -> list[float]:
        """Σ||y - ŷ||² / Σ||y - mean y||² over these kinds' tokens and all dimensions, per layer."""
        squared = self._squared_error[kinds.to(self._count.device)].sum((0, 2)).cpu()
        return (squared / self._spread(kinds).sum(1).clamp_min(1e-30)).tolist()

    def _seed_metrics(self, n_tokens: int) -> tuple[list[float], list[float]]:
        """crosslayer-coding's NMSE and explained variance per layer."""
        spread = self._spread(torch.arange(len(TokenKind)))
        squared = self._squared_error.sum(0).cpu()
        varies = spread > 1e-12 * spread.max()
        ratio = torch.where(varies, squared / spread.clamp_min(1e-30), 0.0)
        nmse = ratio.sum(1) / varies.sum(1).clamp_min(1)
        centred = squared - self._error_sum.cpu().square() / n_tokens
        return nmse.tolist(), (1 - centred.sum(1) / spread.sum(1).clamp_min(1e-30)).tolist()


def evaluate(model: CrossLayerTranscoder, batches: Iterable[ActivationBatch], by_distance: bool = False) -> Evaluation:
    """Metrics of a transcoder over some held-out batches."""
    evaluator = CLTEvaluator(model, by_distance=by_distance)
    for batch in batches:
        evaluator.add(batch)
    return evaluator.result()
