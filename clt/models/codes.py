"""Feature activations of one layer, dense or sparse, behind one set of methods.

Both classes are the same function to whoever decodes, counts or penalises; the dense one wins when many features
fire, the sparse one when few do (see docs/how-it-works.md). Tests hold them equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import embedding_bag

from clt.config import CLTConfig


@dataclass(frozen=True)
class DenseCodes:
    """Activations as a matrix, 0 where a feature is off."""

    values: Float[Tensor, "token feature"]

    def decode(self, weight: Float[Tensor, "feature out"]) -> Float[Tensor, "token out"]:
        """Sum of the active features' rows, each times its activation."""
        return self.values @ weight

    def dense(self) -> Float[Tensor, "token feature"]:
        """As a matrix."""
        return self.values

    def price(self, norm: Float[Tensor, " feature"], steepness: float) -> Float[Tensor, ""]:
        """Sum over tokens and features of tanh(steepness * norm * activation)."""
        return (self.values * (steepness * norm)).tanh().sum()

    def fired(self) -> Integer[Tensor, " feature"]:
        """On how many tokens each feature is on."""
        return (self.values > 0).sum(0)


@dataclass(frozen=True)
class SparseCodes:
    """Only the kept activations, token by token.

    Token i owns entries `offsets[i]` to `offsets[i + 1]`. An entry may be 0 (kept, but not positive).
    """

    values: Float[Tensor, " entry"]
    features: Integer[Tensor, " entry"]
    offsets: Integer[Tensor, " bound"]
    n_features: int

    @staticmethod
    def from_topk(
        values: Float[Tensor, "token k"], features: Integer[Tensor, "token k"], n_features: int
    ) -> SparseCodes:
        """The same number of entries for every token."""
        n_tokens, k = values.shape
        offsets = torch.arange(0, n_tokens * k + 1, k, device=values.device) if k else features.new_zeros(n_tokens + 1)
        return SparseCodes(values.reshape(-1), features.reshape(-1), offsets, n_features)

    @staticmethod
    def from_mask(values: Float[Tensor, "token feature"], keep: Tensor) -> SparseCodes:
        """The entries a mask keeps, however many a token has."""
        tokens, features = keep.nonzero(as_tuple=True)
        offsets = torch.zeros(len(values) + 1, dtype=torch.int64, device=values.device)
        offsets[1:] = keep.sum(1).cumsum(0)
        return SparseCodes(values[tokens, features], features, offsets, values.shape[1])

    def decode(self, weight: Float[Tensor, "feature out"]) -> Float[Tensor, "token out"]:
        """Sum of the active features' rows, each times its activation."""
        return _SparseDecode.apply(self.values, weight, self.features, self.offsets)  # pyright: ignore[reportReturnType]

    def tokens(self) -> Integer[Tensor, " entry"]:
        """Which token each entry belongs to."""
        return token_of_entries(self.offsets, len(self.features))

    def dense(self) -> Float[Tensor, "token feature"]:
        """As a matrix."""
        matrix = self.values.new_zeros(len(self.offsets) - 1, self.n_features)
        return matrix.index_put((self.tokens(), self.features), self.values)

    def price(self, norm: Float[Tensor, " feature"], steepness: float) -> Float[Tensor, ""]:
        """Sum over tokens and features of tanh(steepness * norm * activation)."""
        return (self.values * (steepness * norm)[self.features]).tanh().sum()

    def fired(self) -> Integer[Tensor, " feature"]:
        """On how many tokens each feature is on."""
        return torch.bincount(self.features[self.values > 0], minlength=self.n_features)


Codes = DenseCodes | SparseCodes


def token_of_entries(offsets: Integer[Tensor, " bound"], n_entries: int) -> Integer[Tensor, " entry"]:
    """Which token each entry belongs to, from the bounds of the tokens."""
    tokens = torch.arange(len(offsets) - 1, device=offsets.device)
    return tokens.repeat_interleave(offsets.diff(), output_size=n_entries)


class _SparseDecode(torch.autograd.Function):
    """Gather-and-add of decoder rows, with both gradients as gathers too.

    PyTorch's own backward of embedding_bag adds each entry's gradient to its decoder row one by one; sorted by
    feature, the same sum is again one embedding_bag, over rows of the output gradient.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight, features, offsets)
        return embedding_bag(features, weight, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, weight, features, offsets = ctx.saved_tensors
        grad = grads[0].contiguous()
        tokens = token_of_entries(offsets, len(features))
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = entry_dot(grad, weight, tokens, features, offsets)
        if ctx.needs_input_grad[1]:
            grad_weight = rows_by_feature(values, grad, tokens, features, len(weight))
        return grad_values, grad_weight, None, None


def entry_dot(
    grad: Float[Tensor, "token out"],
    weight: Float[Tensor, "feature out"],
    tokens: Integer[Tensor, " entry"],
    features: Integer[Tensor, " entry"],
    offsets: Integer[Tensor, " bound"],
) -> Float[Tensor, " entry"]:
    """For each entry, its token's output gradient times its feature's decoder row."""
    if grad.device.type == "cpu":
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, weight, features, offsets, tokens, 0, -1)
    return (grad[tokens] * weight[features]).sum(1)


def rows_by_feature(
    values: Float[Tensor, " entry"],
    grad: Float[Tensor, "token out"],
    tokens: Integer[Tensor, " entry"],
    features: Integer[Tensor, " entry"],
    n_features: int,
) -> Float[Tensor, "feature out"]:
    """For each feature, the output gradients of the tokens it fired on, each times its activation."""
    order = features.argsort()
    bounds = torch.zeros(n_features + 1, dtype=torch.int64, device=features.device)
    bounds[1:] = torch.bincount(features, minlength=n_features).cumsum(0)
    return embedding_bag(
        tokens[order], grad, bounds, mode="sum", per_sample_weights=values[order], include_last_offset=True
    )


class _AddWindows(torch.autograd.Function):
    """Sum of every source's block of targets; autograd's slice assignment would copy the whole sum per source."""

    @staticmethod
    def forward(ctx: Any, config: CLTConfig, *parts: Tensor) -> Tensor:
        ctx.config = config
        tokens = len(parts[0])
        total = parts[0].new_zeros(tokens, config.num_layers, config.d_model)
        for source, part in enumerate(parts):
            targets = config.targets_of(source)
            if len(targets):
                total[:, targets.start : targets.stop] += part.view(tokens, len(targets), config.d_model)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        windows = (ctx.config.targets_of(source) for source in range(ctx.config.num_layers))
        return None, *(grads[0][:, w.start : w.stop].flatten(1) for w in windows)


def add_windows(parts: Sequence[Float[Tensor, "token _"]], config: CLTConfig) -> Float[Tensor, "token layer d_model"]:
    """Place each source's output, `[token, target * d_model]`, at the layers it writes to, and sum."""
    return _AddWindows.apply(config, *parts)  # pyright: ignore[reportReturnType]
