"""relu and jumprelu on whole matrices, with their penalties, forward and backward in one pass each.

    a = h where h > theta, else 0
    price * sum tanh(steepness * norm * a)          what active features pay
    pull * sum relu(theta - h) * norm               what silent ones pay (or, `negative`: pull * sum relu(-h))

The straight-through gradients are those of clt/models/activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from clt.models.kernels.pointers import call, compiled, is_half, on_gpu


@dataclass(frozen=True, kw_only=True)
class GateTerms:
    """Weights and shapes of the terms; sums over tokens are not divided by anything."""

    price: float = 0.0
    steepness: float = 1.0
    pull: float = 0.0
    negative: bool = False
    """The seeds' form of the pull."""
    bandwidth: float = 0.0
    """Of the straight-through window; 0: none (relu)."""
    height_is_h: bool = False
    """crosslayer-coding's pseudo-gradient -(h/w) instead of -(theta/w)."""
    reaches_h: bool = False
    """The straight-through term also trains what h is made of."""

    @property
    def are_absent(self) -> bool:
        """Whether nothing but the reconstruction has a gradient."""
        return not (self.price or self.pull or self.bandwidth)


@dataclass(frozen=True)
class GateGradients:
    """Sums over tokens, by feature."""

    bias: Float[Tensor, " feature"]
    theta: Float[Tensor, " feature"]
    norm: Float[Tensor, " feature"]
    price: Float[Tensor, " feature"]
    """Sum of tanh(...), without its weight; on a GPU left out where that is 0."""
    pull: Float[Tensor, " feature"]
    """Sum of relu(...), without its weight and the norm."""


def gate(
    h: Float[Tensor, "token feature"], theta: Float[Tensor, " feature"], fired: Integer[Tensor, " feature"]
) -> Float[Tensor, "token feature"]:
    """The activation; adds to `fired` on how many tokens each feature is on. A NaN stays one."""
    gpu = _on_gpu(h, theta)
    if gpu is not None:
        return gpu.gate(h, theta, fired)
    half, library = is_half(h), compiled(theta, fired)
    if half is None or library is None:
        on = ~(h <= theta)
        fired += on.sum(0)
        return torch.where(on, h, h.new_zeros(()))
    out = torch.empty_like(h)
    call(library.clt_gate, h, half, theta, *h.shape, False, out, fired)
    return out


def gate_transposed(
    h: Float[Tensor, "token feature"], theta: Float[Tensor, " feature"]
) -> Float[Tensor, "feature token"]:
    """The activation once more, `[feature, token]`: the left operand of the decoder's gradient."""
    half, library = is_half(h), compiled(theta)
    if half is None or library is None:
        return torch.where(h <= theta, h.new_zeros(()), h).T
    out = h.new_empty(h.shape[1], h.shape[0])
    call(library.clt_gate, h, half, theta, *h.shape, True, out, None)
    return out


def gate_backward(
    h: Float[Tensor, "token feature"],
    grad: Float[Tensor, "token feature"],
    theta: Float[Tensor, " feature"],
    norm: Float[Tensor, " feature"],
    terms: GateTerms,
) -> tuple[Float[Tensor, "feature token"], GateGradients]:
    """From the gradient of the activations to that of h, `[feature, token]`, and the sums; `grad` may be used up."""
    gpu = _on_gpu(h, theta, norm) if grad.is_contiguous() and grad.dtype == h.dtype else None
    if gpu is not None:
        out, sums = gpu.gate_backward(h, grad, theta, norm, terms)
        return out.T, GateGradients(*sums)
    half, library = is_half(h), compiled(theta, norm)
    if half is None or library is None or not grad.is_contiguous():
        return _in_torch(h, grad, theta, norm, terms)
    out, sums = h.new_empty(h.shape[1], h.shape[0]), theta.new_empty(5, len(theta))
    weights = terms.price, terms.steepness, terms.pull, terms.bandwidth
    call(
        library.clt_gate_backward,
        *(h, grad, half, theta, norm, *weights, terms.height_is_h, terms.reaches_h, terms.negative, *h.shape),
        *(out, sums),
    )
    return out, GateGradients(*sums)


def _on_gpu(h: Tensor, *by_feature: Tensor) -> Any:
    """The Triton kernels, which compute in fp32."""
    fits = h.itemsize <= 4 and h.is_contiguous() and all(each.dtype == torch.float32 for each in by_feature)
    return on_gpu(h, module="triton_gate") if fits else None


def _in_torch(h: Tensor, grad: Tensor, theta: Tensor, norm: Tensor, terms: GateTerms) -> tuple[Tensor, GateGradients]:
    kind = h.dtype
    h, grad = (x.to(torch.promote_types(kind, torch.float32)) for x in (h, grad))
    on = ~(h <= theta)
    a = torch.where(on, h, h.new_zeros(()))
    tanh = (terms.steepness * norm * a).tanh()
    slope = terms.price * terms.steepness * (1 - tanh.square())
    grad = grad + slope * norm
    step = torch.zeros_like(h)
    if terms.bandwidth > 0:
        near = (h - theta).abs() < terms.bandwidth / 2
        step = grad * near * (h if terms.height_is_h else theta) / terms.bandwidth
    gap = (-h if terms.negative else theta - h).relu()
    below, weight = terms.pull * (gap > 0).to(h.dtype), torch.ones_like(norm) if terms.negative else norm
    grad_h = grad * on - below * weight
    if terms.reaches_h:
        grad_h = grad_h + step
    through_norm, through_theta = slope * a, -step
    if not terms.negative:
        through_norm, through_theta = through_norm + terms.pull * gap, through_theta + below * weight
    sums = (x.sum(0) for x in (grad_h, through_theta, through_norm, tanh, gap))
    return grad_h.to(kind).T, GateGradients(*sums)
