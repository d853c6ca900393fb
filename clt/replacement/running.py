"""One forward pass with a transcoder in place: each layer's features are spent on the MLPs still to come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from clt.errors import HostModelError
from clt.models import BaseTranscoder
from clt.replacement.intervention import Edit
from clt.replacement.passes import Passes
from clt.replacement.recording import FeatureRecord

# Numbers held at once for features, or for what they write to all targets, of a piece of the tokens (128 MB in fp32).
NUMBERS_AT_ONCE = 2**25


class RunningPrediction:
    """Sums, per target, what the sources met so far contribute.

    Layers come in the order of the host, so a target's sum is complete when its MLP is asked for. Memory: one number
    per token, layer and dimension, and at most `NUMBERS_AT_ONCE` for what depends on the dictionary. Nothing is
    carried from one forward pass to the next but the count of positions, so a pass over one new token with a KV
    cache gives that token's row of the pass over all.
    """

    def __init__(
        self,
        transcoder: BaseTranscoder,
        targets: Sequence[int],
        passes: Passes,
        edit: Edit,
        *,
        errors: Float[Tensor, "layer row position d_model"] | None = None,
        record: FeatureRecord | None = None,
    ) -> None:
        """Start before the first position.

        Args:
            targets: the layers whose MLP outputs will be asked for.
            errors: what to add to those outputs, in the order of `targets`.
            record: keeps the features, as they are after the edit.
        """
        self._transcoder, self._targets, self._passes, self._edit = transcoder, list(targets), passes, edit
        self._errors, self._record = errors, record
        self._device = transcoder.bias(0).device
        self._sums = self._zeros(0)
        self._biases: dict[int, Tensor] = {}

    def predict(self, layer: int, mlp_input: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The MLP output of one layer; layers are to be called, or shown to `spend`, in order."""
        self.spend(layer, mlp_input)
        sums = self._sums
        prediction = (sums[layer] + self._bias(layer)).to(mlp_input.device).view(mlp_input.shape)
        return prediction if self._errors is None else prediction + self._error(layer, mlp_input)

    def spend(self, source: int, mlp_input: Float[Tensor, "*row d_model"]) -> None:
        """Add what one layer's features write to the sums of its targets."""
        tokens = mlp_input.reshape(-1, mlp_input.shape[-1]).to(self._device)
        if source == 0:
            self._sums = self._zeros(len(tokens))
        config, sums = self._transcoder.config, self._sums
        for piece in self._pieces(source, len(tokens)):
            targets = config.targets_of(source)
            parts = self._contributions(source, tokens, piece)
            sums[targets.start : targets.stop, piece] += parts
        if config.skip_connection != "none":
            targets = config.skip_targets_of(source)
            sums[targets.start : targets.stop] += self._transcoder.skip(source, tokens)

    def _zeros(self, n_tokens: int) -> Float[Tensor, "layer token d_model"]:
        shape = (self._transcoder.config.num_layers, n_tokens, self._transcoder.config.d_model)
        return self._transcoder.bias(0).new_zeros(shape)

    def _bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Computed once, unless a gradient is to reach it."""
        if torch.is_grad_enabled():
            return self._transcoder.bias(layer)
        if layer not in self._biases:
            self._biases[layer] = self._transcoder.bias(layer)
        return self._biases[layer]

    def _contributions(self, source: int, tokens: Tensor, piece: slice) -> Float[Tensor, "target token d_model"]:
        """What the features of some tokens write to each target."""
        features = self._transcoder.encode_layer(source, tokens[piece])
        if self._edit.touches(source):
            features = self._edit.apply(source, features, piece)
        if self._record is not None:
            self._record.add(source, features, piece, self._passes)
        return self._transcoder.contributions(source, features)

    def _pieces(self, source: int, n_tokens: int) -> Iterator[slice]:
        """Stretches of tokens that fit `NUMBERS_AT_ONCE`; one, if a plain callable must see all."""
        config = self._transcoder.config
        width = max(config.num_features, config.d_model * len(config.targets_of(source)))
        step = n_tokens if self._edit.needs_whole_layers else max(1, NUMBERS_AT_ONCE // width)
        for start in range(0, max(n_tokens, 1), max(step, 1)):
            yield slice(start, min(start + step, n_tokens))

    def _error(self, layer: int, mlp_input: Tensor) -> Tensor:
        assert self._errors is not None
        columns, n_known = self._passes.columns, self._errors.shape[2]
        if columns.stop > n_known:
            raise HostModelError(
                f"The errors cover {n_known} positions, but the replacement model is at position {columns.stop}. "
                "Capture them on the whole text, prompt and answer."
            )
        return self._errors[self._targets.index(layer)][:, columns].to(mlp_input).reshape(mlp_input.shape)
