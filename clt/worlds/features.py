"""The features world: activations made of sparse features one has written oneself.

Every token switches on a few features. A feature is read along one direction at its own layer and writes a decoder
vector to that layer's MLP output and every later one. So the best possible cross-layer transcoder is known exactly:
what it should find, where it should write, and when it should fire.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clt.errors import WorldError
from clt.types import ActivationBatch, TokenKind
from clt.worlds.base import Split, split_number


@dataclass(frozen=True, kw_only=True)
class TrueFeatures:
    """The ground truth.

    Directions are unit vectors. `layer[f]` is where feature f is read; its decoder is zero at earlier layers.
    """

    layer: Int64[Tensor, " feature"]
    encoder: Float[Tensor, "feature d_model"]
    decoder: Float[Tensor, "target feature d_model"]


@dataclass(frozen=True, kw_only=True)
class TrueActivations:
    """A batch with the feature activations it was made from."""

    batch: ActivationBatch
    active: Float[Tensor, "token feature"]
    """How strongly each feature fires; 0 where it is off."""


@dataclass(frozen=True, kw_only=True)
class FeaturesWorld:
    """Synthetic activations of any size.

    With at most `d_model` features per layer the directions read at one layer are orthonormal (features can be read
    without interference); with more they are random unit vectors in superposition.
    """

    name: str = "features"
    summary: str = "synthetic activations with known sparse features written across layers"
    n_layers: int = 4
    d_model: int = 128
    n_features: int = 256
    """Over all layers; divided evenly."""
    density: float = 0.02
    """Probability that a feature fires on a token."""
    noise: float = 0.0
    """Standard deviation of what is added to the inputs, per coordinate; targets stay exact."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_features % self.n_layers:
            raise WorldError(
                f"n_features={self.n_features} cannot be divided among n_layers={self.n_layers}. "
                f"Choose a multiple of {self.n_layers}."
            )
        if not 0 < self.density <= 1:
            raise WorldError(f"density={self.density} is a probability: choose it above 0 and at most 1.")

    def features(self) -> TrueFeatures:
        """The ground truth of this world; the same seed and sizes always give the same."""
        random = self._random(2, 0)
        per_layer = self.n_features // self.n_layers
        layer = torch.arange(self.n_layers).repeat_interleave(per_layer)
        directions = torch.randn(self.n_layers, per_layer, self.d_model, generator=random)
        if per_layer <= self.d_model:
            directions = torch.linalg.qr(directions.mT).Q.mT
        decoder = torch.randn(self.n_layers, self.n_features, self.d_model, generator=random)
        decoder /= decoder.norm(dim=-1, keepdim=True)
        reaches = torch.arange(self.n_layers)[:, None] >= layer
        encoder = (directions / directions.norm(dim=-1, keepdim=True)).flatten(0, 1)
        return TrueFeatures(layer=layer, encoder=encoder.contiguous(), decoder=decoder * reaches[..., None])

    def activations(self, split: Split, n_tokens: int, seed: int = 0) -> TrueActivations:
        """That many tokens; inputs are sums of what is read at each layer, targets of what is written to it.

        Strengths are between 0.5 and 1.5, so whether a feature fires is never a matter of rounding.
        """
        truth = self.features()
        random = self._random(split_number(split), seed)
        fires = torch.rand(n_tokens, self.n_features, generator=random) < self.density
        active = fires * (0.5 + torch.rand(n_tokens, self.n_features, generator=random))
        read = active.unflatten(1, (self.n_layers, -1)).transpose(0, 1)
        inputs = read @ truth.encoder.unflatten(0, (self.n_layers, -1))
        if self.noise:
            inputs += self.noise * torch.randn(inputs.shape, generator=random)
        batch = ActivationBatch(
            inputs=inputs,
            targets=active @ truth.decoder,
            kind=torch.full((n_tokens,), TokenKind.TEXT, dtype=torch.uint8),
            sample=torch.arange(n_tokens),
            position=torch.zeros(n_tokens, dtype=torch.int64),
        )
        return TrueActivations(batch=batch, active=active)

    def _random(self, stream: int, seed: int) -> torch.Generator:
        """A generator per (world seed, stream, seed) that shares nothing with the others."""
        mixed = (self.seed * 1_000_003 + seed) * 3 + stream
        return torch.Generator().manual_seed(mixed)
