"""The sparse operations as Triton kernels, for GPUs; Triton's interpreter runs them on a CPU (`TRITON_INTERPRET=1`).

Each output element is summed by one program in a fixed order: no atomics, so a run can be repeated bit for bit.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 128
_TOKENS, _FEATURES, _INNER = 32, 64, 32


@triton.jit
def _decode(values, features, offsets, weight, out, width, stride, BLOCK: tl.constexpr) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = out + token * stride + column
    total = tl.load(place, mask=inside, other=0.0)
    for entry in range(tl.load(offsets + token), tl.load(offsets + token + 1)):
        row = weight + tl.load(features + entry) * width + column
        total += tl.load(values + entry) * tl.load(row, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit
def _rows(
    values, order, tokens, bounds, grad, weight, scale, out, width, stride,
    SCALES: tl.constexpr, ACCUMULATES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = out + feature * width + column
    total = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
    if ACCUMULATES:
        total += tl.load(place, mask=inside, other=0.0)
    if SCALES:
        total += tl.load(scale + feature) * tl.load(weight + feature * width + column, mask=inside, other=0.0)
    for sorted_entry in range(tl.load(bounds + feature), tl.load(bounds + feature + 1)):
        entry = tl.load(order + sorted_entry)
        row = grad + tl.load(tokens + entry) * stride + column
        total += tl.load(values + entry) * tl.load(row, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit
def _dots(tokens, features, grad, weight, dots, width, stride, BLOCK: tl.constexpr) -> None:
    entry = tl.program_id(0).to(tl.int64)
    row = grad + tl.load(tokens + entry) * stride
    own = weight + tl.load(features + entry) * width
    total = tl.zeros((BLOCK,), dtype=dots.dtype.element_ty)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total += tl.load(row + column, mask=inside, other=0.0) * tl.load(own + column, mask=inside, other=0.0)
    tl.store(dots + entry, tl.sum(total))


@triton.jit
def _encode(
    x, weight, bias, scale, bound, counts, offsets, features, values, scores, n_tokens, n_features, width, n_tiles,
    SCALES: tl.constexpr, WRITES: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, INNER: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of h = x W^T + b that is never written: first its kept entries are counted, then stored side by side."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    has_token, has_feature = token < n_tokens, feature < n_features
    h = tl.zeros((TOKENS, FEATURES), dtype=values.dtype.element_ty)
    for start in range(0, width, INNER):
        inner = start + tl.arange(0, INNER)
        left = tl.load(
            x + token[:, None] * width + inner[None, :], mask=has_token[:, None] & (inner < width)[None, :], other=0.0
        )
        right = tl.load(
            weight + feature[None, :] * width + inner[:, None],
            mask=has_feature[None, :] & (inner < width)[:, None],
            other=0.0,
        )
        h += tl.dot(left, right, input_precision="ieee").to(h.dtype)
    h += tl.load(bias + feature, mask=has_feature, other=0.0)[None, :].to(h.dtype)
    score = h
    if SCALES:
        score = h * tl.load(scale + feature, mask=has_feature, other=0.0)[None, :]
    above = tl.load(bound + feature, mask=has_feature, other=0.0)[None, :]
    # Not `score > above`: a NaN must be kept, or a broken step would not be noticed.
    keep = ((score <= above) == 0) & has_token[:, None] & has_feature[None, :]
    cell = token * n_tiles + tl.program_id(1)
    if WRITES:
        place = tl.load(offsets + cell, mask=has_token, other=0)[:, None] + tl.cumsum(keep.to(tl.int64), axis=1) - 1
        tl.store(features + place, (feature[None, :] + tl.zeros_like(place)), mask=keep)
        tl.store(values + place, h, mask=keep)
        tl.store(scores + place, score, mask=keep)
    else:
        tl.store(counts + cell, tl.sum(keep.to(tl.int64), axis=1), mask=has_token)


def add_decoded(out: Tensor, values: Tensor, features: Tensor, offsets: Tensor, weight: Tensor) -> None:
    """out += the sum of each token's rows of `weight`, times their values."""
    grid = len(out), triton.cdiv(weight.shape[1], _COLUMNS)
    if out.numel() > 0:
        _decode[grid](values, features, offsets, weight, out, weight.shape[1], out.stride(0), BLOCK=_COLUMNS)


def rows_by_feature(
    values: Tensor, sorted_by: Any, grad: Tensor, weight: Tensor | None, scale: Tensor | None, out: Tensor, adds: bool
) -> None:
    """out = (or +=) scale * weight + for each feature the rows of `grad` of its tokens, times their values.

    Args:
        values: of the entries, in token order.
        sorted_by: a ByFeature.
        grad: rows by token; may be strided.
        weight: rows by feature, used with scale.
        scale: by feature.
        out: rows by feature.
        adds: whether to add to what is there.
    """
    grid = out.shape[0], triton.cdiv(out.shape[1], _COLUMNS)
    if out.numel() == 0:
        return
    places = sorted_by.order, sorted_by.tokens, sorted_by.bounds
    scales = weight is not None and scale is not None
    own = (weight, scale) if scales else (grad, grad)  # pointers that are not followed
    _rows[grid](
        values, *places, grad, *own, out, out.shape[1], grad.stride(0), SCALES=scales, ACCUMULATES=adds, BLOCK=_COLUMNS
    )


def entry_dots(grad: Tensor, weight: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
    """For each entry, its token's row of `grad` times its feature's row of `weight`."""
    dots = grad.new_zeros(len(tokens))
    if dots.numel() > 0:
        _dots[(len(tokens),)](tokens, features, grad, weight, dots, weight.shape[1], grad.stride(0), BLOCK=_COLUMNS)
    return dots


def encode_above(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, bound: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every entry of x W^T + b whose h * scale exceeds the bound: h, feature, score; and where each token's begin.

    The pre-activations are computed twice, tile by tile, and never written: `[token, feature]` is not there.
    """
    n_tokens, n_features, n_tiles = len(x), len(weight), triton.cdiv(len(weight), _FEATURES)
    wide = torch.promote_types(x.dtype, torch.float32)
    counts = torch.zeros(n_tokens, n_tiles, dtype=torch.int64, device=x.device)
    sizes = n_tokens, n_features, x.shape[1], n_tiles
    shape = {"SCALES": scale is not None, "TOKENS": _TOKENS, "FEATURES": _FEATURES, "INNER": _INNER}
    grid = triton.cdiv(n_tokens, _TOKENS), n_tiles
    given = x.contiguous(), weight, bias, bound if scale is None else scale, bound
    none = x.new_empty(1, dtype=wide), x.new_empty(1, dtype=wide)
    if n_tokens > 0:
        _encode[grid](*given, counts, counts, counts, *none, *sizes, WRITES=False, **shape)
    ends = counts.flatten().cumsum(0)
    starts, total = ends - counts.flatten(), int(ends[-1]) if len(ends) else 0
    features = torch.empty(total, dtype=torch.int64, device=x.device)
    values, scores = x.new_empty(total, dtype=wide), x.new_empty(total, dtype=wide)
    if total > 0:
        _encode[grid](*given, counts, starts, features, values, scores, *sizes, WRITES=True, **shape)
    return values, features, scores, torch.nn.functional.pad(counts.sum(1).cumsum(0), (1, 0))
