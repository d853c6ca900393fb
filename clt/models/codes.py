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

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        return len(self.values)

    def decode(self, weight: Float[Tensor, "feature out"]) -> Float[Tensor, "token out"]:
        """Sum of the active features' rows, each times its activation."""
        return self.values @ weight

    def shifted(self, offset: Float[Tensor, " feature"] | None, scale: Float[Tensor, " feature"] | None) -> DenseCodes:
        """(activation + offset) * scale where a feature is on."""
        return DenseCodes(_affine(self.values, offset, scale))

    def decode_each(
        self,
        weight: Float[Tensor, "feature _ d_model"],
        offset: Float[Tensor, "target feature"] | None,
        scale: Float[Tensor, "target feature"] | None,
        n_targets: int,
    ) -> Float[Tensor, "token _"]:
        """For every target the activations as shifted for it, decoded; targets side by side.

        Args:
            weight: one matrix per target, or one that all targets share.
        """
        each = weight.unbind(1) if weight.shape[1] == n_targets else weight.unbind(1) * n_targets
        parts = [self.shifted(_row(offset, i), _row(scale, i)).decode(rows) for i, rows in enumerate(each)]
        return torch.cat(parts, dim=1) if parts else self.values.new_zeros(self.n_tokens, 0)

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

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        return len(self.offsets) - 1

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
        values = self.values.to(weight.dtype)
        return _SparseDecode.apply(values, weight, self.features, self.offsets)  # pyright: ignore[reportReturnType]

    def shifted(self, offset: Float[Tensor, " feature"] | None, scale: Float[Tensor, " feature"] | None) -> SparseCodes:
        """(activation + offset) * scale where a feature is on."""
        at = self.features
        values = _affine(self.values, None if offset is None else offset[at], None if scale is None else scale[at])
        return SparseCodes(values, at, self.offsets, self.n_features)

    def decode_each(
        self,
        weight: Float[Tensor, "feature _ d_model"],
        offset: Float[Tensor, "target feature"] | None,
        scale: Float[Tensor, "target feature"] | None,
        n_targets: int,
    ) -> Float[Tensor, "token _"]:
        """For every target the activations as shifted for it, decoded; targets side by side.

        One gather in all: the bags are the (token, target) pairs, the rows those of `weight` as they lie in memory.

        Args:
            weight: one matrix per target, or one that all targets share.
        """
        if n_targets == 0:
            return self.values.new_zeros(self.n_tokens, 0)
        at, tokens, lengths = self.features, self.tokens(), self.offsets.diff()
        each = torch.arange(n_targets, device=at.device)
        values = _affine(
            self.values[:, None].expand(-1, n_targets),
            None if offset is None else offset[:, at].T,
            None if scale is None else scale[:, at].T,
        )
        n_rows = weight.shape[1]
        rows = at[:, None] * n_rows + (each if n_rows == n_targets else torch.zeros_like(each))
        place = torch.arange(len(at), device=at.device) + (n_targets - 1) * self.offsets[tokens]
        place = (place[:, None] + each * lengths[tokens][:, None]).reshape(-1)
        bounds = n_targets * self.offsets
        starts = (bounds[:-1, None] + each * lengths[:, None]).reshape(-1)
        bags = SparseCodes(
            torch.zeros_like(values).reshape(-1).index_put((place,), values.reshape(-1)),
            torch.zeros_like(rows).reshape(-1).index_put((place,), rows.reshape(-1)),
            torch.cat([starts, bounds[-1:]]),
            self.n_features * n_rows,
        )
        return bags.decode(weight.reshape(-1, weight.shape[2])).view(self.n_tokens, -1)

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


def _affine(values: Tensor, offset: Tensor | None, scale: Tensor | None) -> Tensor:
    """(values + offset) * scale where values are not 0; None adds or multiplies nothing."""
    if offset is not None:
        values = values + offset * (values != 0)
    return values if scale is None else values * scale


def _row(values: Tensor | None, index: int) -> Tensor | None:
    return None if values is None else values[index]


def merge(codes: Sequence[Codes]) -> Codes:
    """The codes of several sources as one: activations of features with the same index add up.

    For decoders that all sources share, which then decode once.
    """
    dense = [code for code in codes if isinstance(code, DenseCodes)]
    sparse = [code for code in codes if isinstance(code, SparseCodes)]
    if dense and sparse:
        return merge([DenseCodes(code.dense()) for code in codes])
    if dense:
        return DenseCodes(sum((code.values for code in dense[1:]), start=dense[0].values))
    lengths = torch.stack([code.offsets.diff() for code in sparse])
    bounds = torch.nn.functional.pad(lengths.sum(0).cumsum(0), (1, 0))
    starts = bounds[:-1] + lengths.cumsum(0) - lengths
    place = torch.cat(
        [
            torch.arange(len(code.features), device=bounds.device) + (start - code.offsets[:-1])[code.tokens()]
            for start, code in zip(starts, sparse)
        ]
    )
    values, features = torch.cat([code.values for code in sparse]), torch.cat([code.features for code in sparse])
    return SparseCodes(
        torch.zeros_like(values).index_put((place,), values),
        torch.zeros_like(features).index_put((place,), features),
        bounds,
        sparse[0].n_features,
    )


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
    def forward(ctx: Any, config: CLTConfig, windows: Sequence[range], *parts: Tensor) -> Tensor:
        ctx.windows = windows
        tokens = len(parts[0])
        total = parts[0].new_zeros(tokens, config.num_layers, config.d_model)
        for targets, part in zip(windows, parts, strict=True):
            if len(targets):
                total[:, targets.start : targets.stop] += part.view(tokens, len(targets), config.d_model)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *(grads[0][:, w.start : w.stop].flatten(1) for w in ctx.windows)


def add_windows(
    parts: Sequence[Float[Tensor, "token _"]], config: CLTConfig, windows: Sequence[range] | None = None
) -> Float[Tensor, "token layer d_model"]:
    """Place each source's output, `[token, target * d_model]`, at the layers it writes to, and sum.

    Args:
        windows: the layers each source writes to; None: those of its decoders.
    """
    windows = windows or [config.targets_of(source) for source in range(config.num_layers)]
    return _AddWindows.apply(config, windows, *parts)  # pyright: ignore[reportReturnType]
