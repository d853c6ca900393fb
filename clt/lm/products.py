"""Products with constant weights whose backward pass leaves out what is zero.

Of a linearised host much is: no gradient reaches queries and keys (in some hosts one matrix makes them together with
the values), nor positions after those that are read, nor any but those that are read in the layer that reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Below this share of rows it pays to gather them.
_FEW = 0.75
# A product of fewer numbers than this is not worth the look.
_SMALL = 100_000


def carries_gradient_alone(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with these is one for `product`."""
    return torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad


def product(
    x: Float[Tensor, "*row d_in"],
    weight: Float[Tensor, "d_in d_out"],
    bias: Tensor | None = None,
    *,
    with_value: bool = True,
) -> Float[Tensor, "*row d_out"]:
    """`x @ weight + bias`, the gradient of x from its rows and columns that are not zero.

    Args:
        with_value: False: zeros, from which a gradient still goes back as it should.
    """
    moved: Any = _Product.apply(x, weight, with_value)
    return moved if bias is None or not with_value else moved + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, with_value: bool) -> Tensor:
        ctx.weight = weight
        return x @ weight if with_value else x.new_zeros(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradient = grads[0].reshape(-1, grads[0].shape[-1])
        return _times(gradient, ctx.weight.T).view(*grads[0].shape[:-1], -1), None, None


def _times(gradient: Float[Tensor, "row d_out"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "row d_in"]:
    """Their product, over the rows and columns of the gradient that are not zero."""
    if gradient.numel() < _SMALL:
        return gradient @ weight
    rows = gradient.any(1).nonzero().squeeze(1)
    columns = gradient.any(0).nonzero().squeeze(1)
    if not len(rows):
        return gradient.new_zeros(len(gradient), weight.shape[1])
    span = slice(int(columns[0]), int(columns[-1]) + 1)
    if len(rows) > _FEW * len(gradient):
        return gradient[:, span] @ weight[span]
    result = gradient.new_zeros(len(gradient), weight.shape[1])
    result[rows] = gradient[rows, span] @ weight[span]
    return result
