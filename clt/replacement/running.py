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

    Layers come in the order of the host, so a target's sum is complete when its MLP is asked for; it is then
    forgotten. Nothing is carried from one forward pass to the next but the count of positions, so a pass over one
    new token with a KV cache gives that token's row of the pass over all.
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
        self._sums: dict[int, Tensor] = {}

    def predict(self, layer: int, mlp_input: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The MLP output of one layer; layers are to be called, or shown to `spend`, in order."""
        self.spend(layer, mlp_input)
        bias = self._transcoder.bias(layer)
        if layer in self._sums:
            prediction = self._sums.pop(layer) + bias
        else:
            prediction = bias.expand(mlp_input[..., 0].numel(), -1)
        prediction = prediction.to(mlp_input.device).view(mlp_input.shape)
        return prediction if self._errors is None else prediction + self._error(layer, mlp_input)

    def spend(self, source: int, mlp_input: Float[Tensor, "*row d_model"]) -> None:
        """Add what one layer's features write to the sums of its targets."""
        if source == 0:
            self._sums.clear()
        tokens = mlp_input.reshape(-1, mlp_input.shape[-1]).to(self._transcoder.bias(source).device)
        parts = [self._contributions(source, tokens, piece) for piece in self._pieces(source, len(tokens))]
        together = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        config = self._transcoder.config
        for target, part in zip(config.targets_of(source), together):
            self._add(target, part)
        for target, part in zip(config.skip_targets_of(source), self._transcoder.skip(source, tokens)):
            self._add(target, part)

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

    def _add(self, target: int, part: Tensor) -> None:
        if target in self._targets:
            self._sums[target] = self._sums[target] + part if target in self._sums else part

    def _error(self, layer: int, mlp_input: Tensor) -> Tensor:
        assert self._errors is not None
        columns, n_known = self._passes.columns, self._errors.shape[2]
        if columns.stop > n_known:
            raise HostModelError(
                f"The errors cover {n_known} positions, but the replacement model is at position {columns.stop}. "
                "Capture them on the whole text, prompt and answer."
            )
        return self._errors[self._targets.index(layer)][:, columns].to(mlp_input).reshape(mlp_input.shape)
