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
        """Plain values for JSON; the density per feature is left out."""
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
        }


class CLTEvaluator:
    """Accumulates exact sums over batches, so the batch size changes nothing."""

    def __init__(self, model: CrossLayerTranscoder, device: torch.device | str | None = None) -> None:
        self.model = model
        self.device = device or model.b_dec.device
        config = model.config
        kinds = len(TokenKind)
        self._squared_error = torch.zeros(kinds, config.num_layers, dtype=torch.float64)
        self._sum = torch.zeros(kinds, config.num_layers, config.d_model, dtype=torch.float64)
        self._square = torch.zeros(kinds, config.num_layers, dtype=torch.float64)
        self._count = torch.zeros(kinds, dtype=torch.int64)
        self._fired: Integer[Tensor, "layer feature"] = torch.zeros(
            config.num_layers, config.num_features, dtype=torch.int64
        )

    @torch.no_grad()
    def add(self, batch: ActivationBatch) -> None:
        """Count one batch."""
        batch = batch.to(self.device)
        features = self.model.encode(batch.inputs)
        targets = batch.targets.double()
        error = (targets - self.model.decode(features, batch.inputs).double()).square().sum(2)
        self._fired += (features > 0).sum(1).cpu()
        for kind in range(len(TokenKind)):
            chosen = batch.kind == kind
            self._count[kind] += int(chosen.sum())
            self._squared_error[kind] += error[:, chosen].sum(1).cpu()
            self._sum[kind] += targets[:, chosen].sum(1).cpu()
            self._square[kind] += targets[:, chosen].square().sum((1, 2)).cpu()

    def result(self) -> Evaluation:
        """Metrics over everything added.

        Raises:
            DatasetError: nothing was added.
        """
        n_tokens = int(self._count.sum())
        if n_tokens == 0:
            raise DatasetError("There is no held-out token to evaluate on. Capture some with --held-out-fraction 0.1.")
        density = self._fired / n_tokens
        per_kind = {
            kind.name.lower(): self._nmse(torch.tensor([kind.value])) for kind in TokenKind if self._count[kind] > 1
        }
        return Evaluation(
            n_tokens=n_tokens,
            nmse_per_layer=self._nmse(torch.arange(len(TokenKind))),
            l0_per_layer=density.sum(1).tolist(),
            dead_per_layer=(self._fired == 0).sum(1).tolist(),
            features_per_layer=self.model.config.num_features,
            nmse_per_kind=per_kind,
            tokens_per_kind={kind.name.lower(): int(self._count[kind]) for kind in TokenKind},
            density=density.float(),
        )

    def _nmse(self, kinds: Integer[Tensor, " kind"]) -> list[float]:
        """Σ||y - ŷ||² / Σ||y - mean y||² over these kinds' tokens and all dimensions, per layer."""
        count = self._count[kinds].sum()
        spread = self._square[kinds].sum(0) - self._sum[kinds].sum(0).square().sum(1) / count
        return (self._squared_error[kinds].sum(0) / spread.clamp_min(1e-30)).tolist()


def evaluate(model: CrossLayerTranscoder, batches: Iterable[ActivationBatch]) -> Evaluation:
    """Metrics of a transcoder over some held-out batches."""
    evaluator = CLTEvaluator(model)
    for batch in batches:
        evaluator.add(batch)
    return evaluator.result()
