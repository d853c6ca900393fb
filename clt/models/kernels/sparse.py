"""Choosing what is kept, and gathers over decoder rows with both gradients: compiled, on a GPU, or in torch.

Nothing here carries gradients; every sum has one order, whatever the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from clt.models.kernels import matmul, torch_sparse
from clt.models.kernels.pointers import call, compiled, is_half, on_gpu


@dataclass(frozen=True)
class Kept:
    """Entries of one layer: token i owns `offsets[i]` to `offsets[i + 1]`, by rising feature."""

    values: Float[Tensor, " entry"]
    features: Integer[Tensor, " entry"]
    offsets: Integer[Tensor, " bound"]
    n_features: int

    @property
    def tokens(self) -> Integer[Tensor, " entry"]:
        """Which token each entry belongs to."""
        each = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return each.repeat_interleave(self.offsets.diff(), output_size=len(self.features))

    def where(self, keep: Tensor) -> Kept:
        """Only the entries that a mask keeps."""
        kept = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
        return Kept(self.values[keep], self.features[keep], kept[self.offsets], self.n_features)

    def with_values(self, values: Tensor) -> Kept:
        """The same entries with other values."""
        return replace(self, values=values)


def keep_topk(h: Float[Tensor, "token feature"], scale: Float[Tensor, " feature"] | None, k: int) -> Kept:
    """The k features of each token with the largest h * scale."""
    n_tokens, n_features = h.shape
    k = min(k, n_features)
    half, library = is_half(h), compiled(scale)
    gpu = on_gpu(h) if h.itemsize <= 4 and h.is_contiguous() else None
    if gpu is not None and n_features <= gpu.MOST_RANKED:
        values, features = gpu.topk(h, scale, k)
    elif half is None or library is None or k == 0 or n_tokens == 0:
        values, features = torch_sparse.topk(h, scale, k)
    else:
        values, features = h.new_empty(n_tokens, k, dtype=torch.float32), h.new_empty(n_tokens, k, dtype=torch.int64)
        call(library.clt_topk, h, half, scale, n_tokens, n_features, k, features, values)
    offsets = torch.arange(n_tokens + 1, device=h.device) * k
    return Kept(_wide(values).reshape(-1), features.reshape(-1), offsets, n_features)


def encode_topk(
    x: Float[Tensor, "token d_model"],
    weight: Float[Tensor, "feature d_model"],
    bias: Float[Tensor, " feature"],
    scale: Float[Tensor, " feature"] | None,
    k: int,
) -> Kept:
    """`keep_topk` of h = x W^T + b; where bf16 products are much faster, fp32 computes only what they leave in doubt.

    The choice is that of fp32 all the same: screen.c says how.
    """
    n_tokens, n_features, k = len(x), len(weight), min(k, len(weight))
    library = compiled(x, weight, bias, scale)
    fits = library is not None and k > 0 and n_tokens > 0
    if library is None or not fits or not matmul.bf16_screens(n_tokens * n_features * x.shape[1]):
        return keep_topk(matmul.affine(x, weight, bias), scale, k)
    (x_half, *x_lengths), (half, *lengths) = (_rounded(rows.contiguous(), library) for rows in (x, weight))
    values, features = x.new_empty(n_tokens, k), torch.empty(n_tokens, k, dtype=torch.int64)
    by = torch.ones_like(bias) if scale is None else scale
    sizes = n_tokens, n_features, x.shape[1], k
    call(
        library.clt_topk_screened,
        *(torch.mm(x_half, half.T), bias, by, x.contiguous(), weight, *x_lengths, *lengths, *sizes, features, values),
    )
    return Kept(values.reshape(-1), features.reshape(-1), torch.arange(n_tokens + 1) * k, n_features)


def _rounded(rows: Float[Tensor, "row column"], library: Any) -> tuple[Tensor, Tensor, Tensor]:
    """In bf16; the length of each row, and of what rounding took from it."""
    half = torch.empty_like(rows, dtype=torch.bfloat16)
    length, lost = rows.new_empty(len(rows)), rows.new_empty(len(rows))
    call(library.clt_round_rows, rows, *rows.shape, half, length, lost)
    return half, length, lost


def keep_above(
    h: Float[Tensor, "token feature"],
    scale: Float[Tensor, " feature"] | None,
    bound: Float[Tensor, " feature"],
) -> tuple[Kept, Float[Tensor, " entry"]]:
    """Every entry with h * scale > bound, and their scores."""
    n_tokens, n_features = h.shape
    half, library = is_half(h), compiled(scale, bound)
    gpu = on_gpu(h) if h.is_contiguous() else None
    if gpu is not None or half is None or library is None:
        values, features, scores, offsets = (gpu or torch_sparse).take_above(h, scale, bound)
        return Kept(_wide(values), features, offsets, n_features), _wide(scores)
    offsets = torch.zeros(n_tokens + 1, dtype=torch.int64)
    call(library.clt_count_above, h, half, scale, bound, n_tokens, n_features, offsets[1:])
    offsets = offsets.cumsum(0)
    total = int(offsets[-1])
    features, values, scores = torch.empty(total, dtype=torch.int64), torch.empty(total), torch.empty(total)
    call(library.clt_take_above, h, half, scale, bound, n_tokens, n_features, offsets, features, values, scores)
    return Kept(values, features, offsets, n_features), scores


def add_decoded(out: Float[Tensor, "token width"], kept: Kept, weight: Float[Tensor, "feature width"]) -> None:
    """out += the sum of each token's rows of `weight` times its values; `out` may be a strided view."""
    fits = out.stride(1) == 1 and weight.is_contiguous()
    gpu = on_gpu(out, weight) if fits else None
    if gpu is not None:
        gpu.add_decoded(out, kept.values, kept.features, kept.offsets, weight)
        return
    library = compiled(out, kept.values, weight) if fits else None
    if library is None:
        torch_sparse.add_decoded(out, kept.values, kept.features, kept.offsets, weight)
        return
    call(
        library.clt_decode,
        *(kept.values, kept.features, kept.offsets, weight, out),
        *(len(out), *weight.shape, out.stride(0)),
    )


class ByFeature:
    """The same entries sorted by feature, for sums over tokens."""

    def __init__(self, kept: Kept) -> None:
        self.kept, self.tokens = kept, kept.tokens
        features, n_entries = kept.features, len(kept.features)
        library = compiled(features)
        if library is None:
            self.order, self.bounds = torch_sparse.sort_by_feature(features, kept.n_features)
            return
        self.order, self.bounds = torch.empty_like(features), features.new_empty(kept.n_features + 1)
        call(library.clt_sort, features, n_entries, kept.n_features, self.order, self.bounds)

    def sum(self, values: Float[Tensor, " entry"]) -> Float[Tensor, " feature"]:
        """Sum of a number per entry over each feature's entries."""
        return torch.segment_reduce(values[self.order], "sum", offsets=self.bounds, initial=0)

    def rows(
        self,
        values: Float[Tensor, " entry"],
        grad: Float[Tensor, "token width"],
        out: Float[Tensor, "feature width"],
        accumulates: bool,
    ) -> None:
        """out = (or +=) for each feature the rows of `grad` of its tokens, times the values."""
        self._backward(values, grad, out, accumulates, None, None, None)

    def decoder_gradients(
        self,
        grad: Float[Tensor, "token width"],
        weight: Float[Tensor, "feature width"],
        scale: Float[Tensor, " feature"] | None,
        out: Float[Tensor, "feature width"],
        accumulates: bool,
        wants_dots: bool = True,
    ) -> Float[Tensor, " entry"] | None:
        """Both gradients of a decode in one pass.

        Args:
            grad: of what was decoded; may be a strided view.
            weight: that it was decoded with.
            scale: adds scale[f] * weight[f] to the gradient of row f (a penalty on the row's length).
            out: becomes (or grows by) the gradient of `weight`.
            accumulates: whether it grows.
            wants_dots: whether the gradient of the values is wanted, which is returned.
        """
        dots = torch.zeros_like(self.kept.values) if wants_dots else None
        return self._backward(self.kept.values, grad, out, accumulates, weight, scale, dots)

    def _backward(
        self,
        values: Tensor,
        grad: Tensor,
        out: Tensor,
        accumulates: bool,
        weight: Tensor | None,
        scale: Tensor | None,
        dots: Tensor | None,
    ) -> Tensor | None:
        fits = grad.stride(1) == 1 and out.is_contiguous()
        gpu = on_gpu(values, grad, out) if fits else None
        if gpu is not None:
            return gpu.backward(values, self, grad, weight, scale, out, accumulates, dots is not None)
        library = compiled(values, grad, out, weight, scale) if fits else None
        if library is None:
            return self._backward_in_torch(values, grad, out, accumulates, weight, scale, dots)
        sizes = len(grad), self.kept.n_features, grad.shape[1], grad.stride(0)
        places = self.order, self.tokens, self.bounds
        call(library.clt_backward, values, *places, grad, weight, scale, out, dots, *sizes, accumulates)
        return dots

    def _backward_in_torch(
        self,
        values: Tensor,
        grad: Tensor,
        out: Tensor,
        accumulates: bool,
        weight: Tensor | None,
        scale: Tensor | None,
        dots: Tensor | None,
    ) -> Tensor | None:
        rows = torch_sparse.rows_by_feature(values, self.tokens, self.order, self.bounds, grad)
        if weight is not None and scale is not None:
            rows.addcmul_(scale[:, None].to(rows.dtype), weight)
        if accumulates:
            out += rows
        else:
            out.copy_(rows)
        if weight is None or dots is None:
            return None
        return torch_sparse.entry_dots(grad, weight, self.tokens, self.kept.features)


def _wide(values: Tensor) -> Tensor:
    """At least fp32: what is kept is little, and sums over it need the digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
