"""The gate of relu and jumprelu with all its penalties as Triton kernels: a pass forward, a pass backward.

Sums over tokens are of blocks of tokens first, in a fixed order.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 128
# With 32 rows at a time the compiler runs out of registers.
_SIZES: dict[str, int] = {"TOKENS": _TOKENS, "ROWS": 16, "BLOCK": 128}


@no_type_check
@triton.jit
def _tanh(z):
    """Without the cancellation that 1 - exp(-2z) has near 0."""
    size = tl.abs(z)
    square = z * z
    near = size * (1 - square * (0.33333334 - square * (0.13333334 - square * 0.053968254)))
    decay = tl.exp(-2 * size)
    value = tl.where(size < 0.1, near, (1 - decay) / (1 + decay))
    return tl.where(z != z, z, tl.where(z < 0, -value, value))


@no_type_check
@triton.jit
def _gate(
    h, theta, out, fired, n_tokens, n_features, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < n_features
    bar = tl.load(theta + feature, mask=inside, other=0.0)[None, :]
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, TOKENS, ROWS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + start + tl.arange(0, ROWS)
        there = (token < n_tokens)[:, None] & inside[None, :]
        place = token[:, None] * n_features + feature[None, :]
        own = tl.load(h + place, mask=there, other=0.0)
        # A NaN stays one.
        on = ((own.to(tl.float32) <= bar) == 0) & there
        tl.store(out + place, tl.where(on, own, 0.0).to(own.dtype), mask=there)
        count += tl.sum(on.to(tl.int32), axis=0)
    tl.store(fired + tl.program_id(0).to(tl.int64) * n_features + feature, count, mask=inside)


@no_type_check
@triton.jit
def _store_rows(row, stride, inside, first, second, third, fourth, fifth):
    tl.store(row, first, mask=inside)
    tl.store(row + stride, second, mask=inside)
    tl.store(row + 2 * stride, third, mask=inside)
    tl.store(row + 3 * stride, fourth, mask=inside)
    tl.store(row + 4 * stride, fifth, mask=inside)


@no_type_check
@triton.jit
def _gate_backward(
    h, grad, theta, norm, out, sums, price, steepness, pull, bandwidth, n_tokens, n_features,
    PRICES: tl.constexpr, PULLS: tl.constexpr, NEGATIVE: tl.constexpr, STEPS: tl.constexpr, HEIGHT_IS_H: tl.constexpr,
    REACHES_H: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """As gate.py has it in torch, line by line."""
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < n_features
    bar = tl.load(theta + feature, mask=inside, other=0.0)[None, :]
    length = tl.load(norm + feature, mask=inside, other=0.0)[None, :]
    by_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    by_theta, by_norm, priced, pulled = by_bias, by_bias, by_bias, by_bias
    for start in range(0, TOKENS, ROWS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + start + tl.arange(0, ROWS)
        there = (token < n_tokens)[:, None] & inside[None, :]
        place = token[:, None] * n_features + feature[None, :]
        own = tl.load(h + place, mask=there, other=0.0).to(tl.float32)
        through = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        on = ((own <= bar) == 0) & there
        active = tl.where(on, own, 0.0)
        if PRICES:
            tanh = _tanh(steepness * length * active)
            slope = price * steepness * (1 - tanh * tanh)
            through += tl.where(there, slope * length, 0.0)
            priced += tl.sum(tanh, axis=0)
            by_norm += tl.sum(slope * active, axis=0)
        grad_h = tl.where(on, through, 0.0)
        if STEPS:
            near = (tl.abs(own - bar) < bandwidth / 2) & there
            step = tl.where(near, through * (own if HEIGHT_IS_H else bar) / bandwidth, 0.0)
            by_theta -= tl.sum(step, axis=0)
            if REACHES_H:
                grad_h += step
        gap = -own if NEGATIVE else bar - own
        gap = tl.where(there & (gap > 0), gap, 0.0)
        pulled += tl.sum(gap, axis=0)
        if PULLS:
            below = tl.where(gap > 0, pull, 0.0)
            grad_h -= below if NEGATIVE else below * length
            if not NEGATIVE:
                by_norm += tl.sum(pull * gap, axis=0)
                by_theta += tl.sum(below * length, axis=0)
        by_bias += tl.sum(grad_h, axis=0)
        tl.store(out + place, grad_h.to(out.dtype.element_ty), mask=there)
    row = sums + tl.program_id(0).to(tl.int64) * 5 * n_features + feature
    _store_rows(row, n_features, inside, by_bias, by_theta, by_norm, priced, pulled)


def gate(h: Tensor, theta: Tensor, fired: Tensor) -> Tensor:
    """h where it exceeds its feature's bar, else 0; adds to `fired` on how many tokens each feature is on."""
    out, (n_tokens, n_features) = torch.empty_like(h), h.shape
    grid = triton.cdiv(n_tokens, _TOKENS), triton.cdiv(n_features, _SIZES["BLOCK"])
    counts = torch.zeros(grid[0], n_features, dtype=torch.int32, device=h.device)
    if h.numel() > 0:
        _gate[grid](h, theta, out, counts, n_tokens, n_features, **_SIZES)
    fired += counts.sum(0)
    return out


def gate_backward(h: Tensor, grad: Tensor, theta: Tensor, norm: Tensor, terms: Any) -> tuple[Tensor, Tensor]:
    """The gradient of h, in the place of `grad`, and the five sums of GateGradients, `[5, feature]`.

    Args:
        h: pre-activations.
        grad: of the activations; of the type of h.
        theta: thresholds.
        norm: decoder norms.
        terms: GateTerms.
    """
    n_tokens, n_features = h.shape
    grid = triton.cdiv(n_tokens, _TOKENS), triton.cdiv(n_features, _SIZES["BLOCK"])
    sums = torch.zeros(grid[0], 5, n_features, dtype=torch.float32, device=h.device)
    what = {"PRICES": terms.price != 0, "PULLS": terms.pull != 0, "STEPS": terms.bandwidth > 0}
    what |= {"NEGATIVE": terms.negative, "HEIGHT_IS_H": terms.height_is_h, "REACHES_H": terms.reaches_h}
    weights = float(terms.price), float(terms.steepness), float(terms.pull), float(terms.bandwidth)
    if h.numel() > 0:
        _gate_backward[grid](h, grad, theta, norm, grad, sums, *weights, n_tokens, n_features, **what, **_SIZES)
    return grad, sums.sum(0)
