"""A running mean of the weights, which is often better than the last ones."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """w_mean <- decay * w_mean + (1 - decay) * w after every step, in fp32; starts at the initial weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._mean = {name: value.detach().float().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        weights = [value.detach().float() for value in self._model.parameters()]
        torch._foreach_lerp_(list(self._mean.values()), weights, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While active, the model has the mean weights."""
        present = [value.detach().clone() for value in self._model.parameters()]
        self._put(self._mean.values())
        try:
            yield
        finally:
            self._put(present)

    def adopt(self) -> None:
        """Give the model the mean weights for good."""
        self._put(self._mean.values())

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._model.parameters(), values, strict=True):
            parameter.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """The means by parameter name."""
        return dict(self._mean)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, value in tensors.items():
            self._mean[name].copy_(value)
