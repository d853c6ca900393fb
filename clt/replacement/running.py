"""One forward pass with a transcoder in place: each layer's features are spent on the MLPs still to come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from clt.errors import HostModelError
from clt.models import BaseTranscoder

Intervene = Callable[[int, Tensor], Tensor]
"""(layer, its feature activations `[..., feature]`) -> what to go on with."""

# Dense activations of more tokens than this at once are not worth their memory.
TOKENS_AT_ONCE = 4096


class RunningPrediction:
    """Sums, per target, what the sources met so far contribute.

    Layers come in the order of the host, so a target's sum is complete when its MLP is asked for; it is then
    forgotten. Nothing is carried from one forward pass to the next but the count of positions, so a pass over one
    new token with a KV cache gives that token's row of the pass over all.
    """

    def __init__(
        self,
        transcoder: BaseTranscoder,
        n_layers: int,
        errors: Float[Tensor, "layer row position d_model"] | None,
        intervene: Intervene | None,
    ) -> None:
        """Start before the first position."""
        self._transcoder = transcoder
        self._n_layers = n_layers
        self._errors = errors
        self._intervene = intervene
        self._sums: dict[int, Tensor] = {}
        self._positions = slice(0, 0)

    def predict(self, layer: int, mlp_input: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The MLP output of one layer; to be called for every layer of a pass, in order."""
        if layer == 0:
            self._start(mlp_input)
        self._spend(layer, mlp_input)
        bias = self._transcoder.bias(layer)
        prediction = (
            (self._sums.pop(layer) + bias) if layer in self._sums else bias.expand(mlp_input[..., 0].numel(), -1)
        )
        prediction = prediction.to(mlp_input.device).view(mlp_input.shape)
        return prediction if self._errors is None else prediction + self._error(layer, mlp_input)

    def _start(self, mlp_input: Tensor) -> None:
        """A new forward pass, over the next positions of the same rows."""
        self._sums.clear()
        if self._errors is not None:
            n_rows, n_known = self._errors.shape[1:3]
            end = self._positions.stop + mlp_input[..., 0].numel() // n_rows
            if end > n_known:
                raise HostModelError(
                    f"The errors cover {n_known} positions, but the replacement model is at position {end}. Capture "
                    "them on the whole text, prompt and answer."
                )
            self._positions = slice(self._positions.stop, end)

    def _spend(self, source: int, mlp_input: Tensor) -> None:
        """Add one layer's contributions to the sums of its targets."""
        tokens = mlp_input.reshape(-1, mlp_input.shape[-1]).to(self._transcoder.bias(source).device)
        if self._intervene is None:
            pieces = [
                self._transcoder.contributions(source, self._transcoder.encode_layer(source, piece))
                for piece in tokens.split(TOKENS_AT_ONCE)
            ]
            parts = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        else:
            features = self._transcoder.encode_layer(source, tokens)
            shaped = features.view(*mlp_input.shape[:-1], -1)
            parts = self._transcoder.contributions(source, self._intervene(source, shaped).reshape(features.shape))
        for target, part in zip(self._transcoder.config.targets_of(source), parts):
            self._add(target, part)
        for target, part in zip(self._transcoder.config.skip_targets_of(source), self._transcoder.skip(source, tokens)):
            self._add(target, part)

    def _add(self, target: int, part: Tensor) -> None:
        if target < self._n_layers:
            self._sums[target] = self._sums[target] + part if target in self._sums else part

    def _error(self, layer: int, mlp_input: Tensor) -> Tensor:
        assert self._errors is not None
        return self._errors[layer][:, self._positions].to(mlp_input).reshape(mlp_input.shape)
