"""Where hand-written backward passes put their results: `.grad`, as autograd does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from clt.models.kernels.matmul import add_product, product

# Buffers of the last step. Fresh memory would have to be cleared by the system, page by page, in every step: a third of
# the time that gathers take to fill it.
_spare: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def put_aside(parameters: Iterable[Tensor]) -> None:
    """Take the gradients away, keeping their memory for those of the next step."""
    for parameter in parameters:
        if parameter.grad is not None:
            _spare[parameter], parameter.grad = parameter.grad, None


def forget(parameters: Iterable[Tensor]) -> None:
    """Free the gradients and what was put aside."""
    for parameter in parameters:
        parameter.grad = None
        _spare.pop(parameter, None)


def place(parameter: Tensor) -> tuple[Tensor, bool]:
    """The gradient's buffer, and whether what is in it counts (else it is to be overwritten)."""
    counts = parameter.grad is not None
    if parameter.grad is None:
        spare = _spare.pop(parameter, None)
        parameter.grad = torch.empty_like(parameter) if spare is None else spare
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
