"""How much of the error each distance between source and target takes away."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from clt.models import CrossLayerTranscoder

# Tokens decoded source by source at once; bounds the memory to (pairs of layers) x this x d_model numbers.
_TOKENS = 512


class DistanceErrors:
    """Squared errors of reconstructions that use only sources within a distance of their target.

    Entry [d, t] counts the sources of layer t at distances `first_target` to `first_target + d - 1`: entry 0 has no
    source at all (biases only), the last one all. The rest of a transcoder (biases, skip connections) always counts.
    """

    def __init__(self, model: CrossLayerTranscoder) -> None:
        self._model = model
        config = model.config
        self._squared = torch.zeros(config.span + 1, config.num_layers, dtype=torch.float64, device=model.b_dec.device)

    @torch.no_grad()
    def add(
        self,
        features: Float[Tensor, "layer token feature"],
        prediction: Float[Tensor, "layer token d_model"],
        targets: Float[Tensor, "layer token d_model"],
    ) -> None:
        """Count one batch."""
        for start in range(0, features.shape[1], _TOKENS):
            rows = slice(start, start + _TOKENS)
            self._add_rows(features[:, rows], prediction[:, rows], targets[:, rows])

    def _add_rows(self, features: Tensor, prediction: Tensor, targets: Tensor) -> None:
        """Take the farthest sources away, one distance after the other."""
        config = self._model.config
        error = targets.double() - prediction.double()
        parts = [self._model.contributions(source, features[source]) for source in range(config.num_layers)]
        for distance in reversed(range(config.span + 1)):
            self._squared[distance] += error.square().sum((1, 2))
            for source, part in enumerate(parts):
                if 0 < distance <= len(part):
                    error[config.targets_of(source)[distance - 1]] += part[distance - 1].double()

    def nmse(self, spread: Float[Tensor, " layer"]) -> dict[str, list[float]]:
        """By largest distance used (`none` first), NMSE per layer.

        Args:
            spread: sum of ||y - mean y||² per layer over the same tokens.
        """
        first = self._model.config.first_target
        names = ["none", *(str(first + distance) for distance in range(len(self._squared) - 1))]
        values = self._squared.cpu() / spread.clamp_min(1e-30)
        return dict(zip(names, values.tolist(), strict=True))
