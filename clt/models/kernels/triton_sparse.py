"""The sparse operations as Triton kernels, for GPUs; Triton's interpreter runs them on a CPU (`TRITON_INTERPRET=1`).

Each output element is summed by one program in a fixed order: no atomics, so a run can be repeated bit for bit.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns and entries of a program, and its warps: of eleven tried on an H100 the fastest (rows of 9,216 and 3,072).
_DECODE: dict[str, int] = {"BLOCK": 256, "ENTRIES": 8, "num_warps": 2}
_BACKWARD: dict[str, int] = {"BLOCK": 512, "ENTRIES": 4, "num_warps": 2}
_SCAN = 2048
MOST_RANKED = 2**15
"""A row of so many features is ranked by one program."""


@no_type_check  # else a checker of types wraps them, and Triton no longer finds their names
@triton.jit
def _decode(values, features, offsets, weight, out, width, stride, BLOCK: tl.constexpr, ENTRIES: tl.constexpr) -> None:
    """Some columns of a token, `ENTRIES` rows at a time, so that many loads are under way at once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = out + token * stride + column
    total = tl.load(place, mask=inside, other=0.0)
    end = tl.load(offsets + token + 1)
    for start in range(tl.load(offsets + token), end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        there = entry < end
        feature = tl.load(features + entry, mask=there, other=0)
        row = weight + feature[:, None] * width + column[None, :]
        rows = tl.load(row, mask=there[:, None] & inside[None, :], other=0.0).to(total.dtype)
        total += tl.sum(tl.load(values + entry, mask=there, other=0.0)[:, None] * rows, axis=0)
    tl.store(place, total, mask=inside)


@no_type_check
@triton.jit
def _backward(
    values, order, tokens, bounds, grad, weight, scale, out, dots, width, stride, n_entries,
    SCALES: tl.constexpr, ACCUMULATES: tl.constexpr, DOTS: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """Some columns of a feature: its weight is read once, each entry's row of the gradient once for both results."""
    feature = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = out + feature * width + column
    total = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
    own = total
    if ACCUMULATES:
        total += tl.load(place, mask=inside, other=0.0)
    if SCALES or DOTS:
        own = tl.load(weight + feature * width + column, mask=inside, other=0.0)
    if SCALES:
        total += tl.load(scale + feature) * own
    end = tl.load(bounds + feature + 1)
    for start in range(tl.load(bounds + feature), end, ENTRIES):
        sorted_entry = start + tl.arange(0, ENTRIES)
        there = sorted_entry < end
        entry = tl.load(order + sorted_entry, mask=there, other=0)
        token = tl.load(tokens + entry, mask=there, other=0)
        row = grad + token[:, None] * stride + column[None, :]
        rows = tl.load(row, mask=there[:, None] & inside[None, :], other=0.0).to(total.dtype)
        total += tl.sum(tl.load(values + entry, mask=there, other=0.0)[:, None] * rows, axis=0)
        if DOTS:
            part = dots + tl.program_id(1).to(tl.int64) * n_entries + entry
            tl.store(part, tl.sum(rows * own[None, :], axis=1), mask=there)
    tl.store(place, total, mask=inside)


@no_type_check
@triton.jit
def _above(
    h, scale, bound, offsets, features, values, scores, n_features,
    SCALES: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A token's entries above the bound: counted into `offsets` (one place on), or stored from there on."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(offsets + token) if WRITES else token * 0
    for start in range(0, n_features, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        inside = feature < n_features
        own = tl.load(h + token * n_features + feature, mask=inside, other=0.0).to(values.dtype.element_ty)
        score = own * tl.load(scale + feature, mask=inside, other=0.0) if SCALES else own
        # Not `score > bound`: a NaN must be kept, or a broken step would not be noticed.
        keep = ((score <= tl.load(bound + feature, mask=inside, other=0.0)) == 0) & inside
        if WRITES:
            at = place + tl.cumsum(keep.to(tl.int32), axis=0) - 1
            tl.store(features + at, feature.to(tl.int64), mask=keep)
            tl.store(values + at, own, mask=keep)
            tl.store(scores + at, score, mask=keep)
        place += tl.sum(keep.to(tl.int32), axis=0)
    if not WRITES:
        tl.store(offsets + token + 1, place)


@no_type_check
@triton.jit
def _keys(h, scale, feature, inside, SCALES: tl.constexpr):
    """h * scale as integers of the same order; a NaN above all, what is outside below all."""
    score = tl.load(h + feature, mask=inside, other=0.0).to(tl.float32)
    if SCALES:
        score *= tl.load(scale + feature, mask=inside, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(score != score, 0x7FFFFFFF, key)
    return tl.where(inside, key, -0x80000000).to(tl.int32)


@no_type_check
@triton.jit
def _bars(
    h, scale, bars, spare, n_features, k, SCALES: tl.constexpr, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    """A token's bar, at or above which its k best keys lie, and how many of those right at the bar belong to them.

    The bar is halved in on until k keys are left or a single value is.
    """
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    key = _keys(h + token * n_features, scale, feature, feature < n_features, SCALES)
    # Of keys >= low there are k or more, of those >= high fewer.
    low, high = token * 0 - 0x80000000, tl.max(key, axis=0).to(tl.int64) + 1
    above, beyond = BLOCK, 0
    while (high - low > 1) & (above != k):
        middle = (low + high) >> 1
        count = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), axis=0)
        enough = count >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        above, beyond = tl.where(enough, count, above), tl.where(enough, beyond, count)
    tl.store(bars + token, low.to(tl.int32))
    # With k left, all of them belong; else they are `beyond` above the bar and some of those at it.
    tl.store(spare + token, tl.where(above == k, k, k - beyond).to(tl.int32))


@no_type_check
@triton.jit
def _best(
    h, scale, bars, spare, features, values, n_features, k, SCALES: tl.constexpr, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    """A token's k best entries, by rising feature; of those at the bar the first."""
    token = tl.program_id(0).to(tl.int64)
    bar, left = tl.load(bars + token), tl.load(spare + token)
    place = token * k
    for start in range(0, n_features, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        inside = feature < n_features
        key = _keys(h + token * n_features, scale, feature, inside, SCALES)
        equal = ((key == bar) & inside).to(tl.int32)
        keep = (key > bar) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= left))
        at = place + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        own = tl.load(h + token * n_features + feature, mask=keep, other=0.0).to(tl.float32)
        tl.store(features + at, feature.to(tl.int64), mask=keep)
        tl.store(values + at, own, mask=keep)
        place += tl.sum(keep.to(tl.int32), axis=0)
        left -= tl.sum(equal, axis=0)


def add_decoded(out: Tensor, values: Tensor, features: Tensor, offsets: Tensor, weight: Tensor) -> None:
    """out += the sum of each token's rows of `weight`, times their values."""
    width = weight.shape[1]
    grid = len(out), triton.cdiv(width, _DECODE["BLOCK"])
    if out.numel() > 0:
        _decode[grid](values, features, offsets, weight, out, width, out.stride(0), **_DECODE)


def backward(
    values: Tensor,
    sorted_by: Any,
    grad: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    adds: bool,
    wants_dots: bool,
) -> Tensor | None:
    """out = (or +=) scale * weight + for each feature the rows of `grad` of its tokens, times their values.

    Args:
        values: of the entries, in token order.
        sorted_by: a ByFeature.
        grad: rows by token; may be strided.
        weight: rows by feature, used with scale and for the dots.
        scale: by feature.
        out: rows by feature.
        adds: whether to add to what is there.
        wants_dots: whether to return, for each entry, its token's row of `grad` times its feature's row of `weight`.
    """
    width, n_entries = out.shape[1], len(values)
    grid = out.shape[0], triton.cdiv(width, _BACKWARD["BLOCK"])
    # One number per block of columns, then summed: programs that added to one number would do so in any order.
    dots = values.new_zeros(grid[1] if wants_dots else 0, n_entries, dtype=out.dtype)
    if out.numel() > 0:
        places = sorted_by.order, sorted_by.tokens, sorted_by.bounds
        scales = weight is not None and scale is not None
        own = grad if weight is None else weight, scale if scales else grad  # else pointers that are not followed
        what = {"SCALES": scales, "ACCUMULATES": adds, "DOTS": wants_dots}
        sizes = width, grad.stride(0), n_entries
        _backward[grid](values, *places, grad, *own, out, dots, *sizes, **what, **_BACKWARD)
    return dots.sum(0) if wants_dots else None


def take_above(h: Tensor, scale: Tensor | None, bound: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every entry with h * scale above the bound: h, feature, score; and where each token's begin."""
    n_tokens, n_features = h.shape
    wide = torch.promote_types(h.dtype, torch.float32)
    how: dict[str, Any] = {"SCALES": scale is not None, "BLOCK": _SCAN}
    given = h, bound if scale is None else scale, bound
    counts = torch.zeros(n_tokens + 1, dtype=torch.int64, device=h.device)
    none = h.new_empty(1, dtype=wide)
    if n_tokens > 0:
        _above[(n_tokens,)](*given, counts, counts, none, none, n_features, WRITES=False, **how)
    offsets = counts.cumsum(0)
    total = int(offsets[-1])
    features = torch.empty(total, dtype=torch.int64, device=h.device)
    values, scores = h.new_empty(total, dtype=wide), h.new_empty(total, dtype=wide)
    if total > 0:
        _above[(n_tokens,)](*given, offsets, features, values, scores, n_features, WRITES=True, **how)
    return values, features, scores, offsets


def topk(h: Tensor, scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k entries of each token with the largest h * scale (of equals the first): their h and their features."""
    n_tokens, n_features = h.shape
    features = torch.empty(n_tokens, k, dtype=torch.int64, device=h.device)
    values = h.new_empty(n_tokens, k, dtype=torch.float32)
    bars, spare = torch.empty(2, n_tokens, dtype=torch.int32, device=h.device).unbind()
    if features.numel() > 0:
        given, block = (h, h if scale is None else scale, bars, spare), triton.next_power_of_2(n_features)
        warps = max(1, min(32, block // 256))
        _bars[(n_tokens,)](*given, n_features, k, SCALES=scale is not None, BLOCK=block, num_warps=warps)
        _best[(n_tokens,)](*given, features, values, n_features, k, SCALES=scale is not None, BLOCK=_SCAN)
    return values, features
