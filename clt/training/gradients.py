"""Where hand-written backward passes put their results: `.grad`, as autograd does."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from clt.models.kernels.matmul import add_product, product


def place(parameter: Tensor) -> tuple[Tensor, bool]:
    """The gradient's buffer, and whether what is in it counts (else it is to be overwritten)."""
    counts = parameter.grad is not None
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    return parameter.grad, counts


def add(parameter: Tensor, value: Tensor) -> None:
    """Add a gradient as it is."""
    grad, counts = place(parameter)
    if counts:
        grad += value
    else:
        grad.copy_(value)


def add_to_rows(parameter: Tensor, rows: Integer[Tensor, " kept"], value: Tensor) -> None:
    """Add to some rows."""
    grad, counts = place(parameter)
    if not counts:
        grad.zero_()
    grad.index_add_(0, rows, value.to(grad.dtype))


def add_matrices(parameter: Tensor, left: Float[Tensor, "row inner"], right: Float[Tensor, "inner column"]) -> None:
    """Add left @ right."""
    if parameter.grad is None:
        # What the product brings becomes the gradient: no second buffer of the size of a decoder.
        parameter.grad = product(left, right).to(parameter.dtype).view_as(parameter)
    else:
        add_product(parameter.grad.view(left.shape[0], -1), left, right)
