"""The host with its MLP outputs at their mean: replacing without looking, the zero of loss recovered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float64
from torch import Tensor

from clt.errors import ConfigError
from clt.lm import HostInputs, ModelAdapter
from clt.replacement.intervention import Interventions
from clt.replacement.steerable import Steerable
from clt.types import Sample


def mean_outputs(adapter: ModelAdapter, samples: Sequence[Sample], batch_size: int) -> Float64[Tensor, "layer d_model"]:
    """The mean MLP output of each layer over all tokens of the samples."""
    total = torch.zeros(adapter.n_layers, adapter.d_model, dtype=torch.float64)
    n_tokens = 0
    for start in range(0, len(samples), batch_size):
        batch = adapter.capture(adapter.prepare(samples[start : start + batch_size]))
        total += batch.targets.sum(1, dtype=torch.float64).cpu()
        n_tokens += batch.n_tokens
    return total / n_tokens


class MeanAblated(Steerable):
    """Every MLP output of the chosen layers is a constant."""

    def __init__(self, adapter: ModelAdapter, means: Float64[Tensor, "layer d_model"], layers: Sequence[int]) -> None:
        """Nothing is put in place yet.

        Args:
            means: as `mean_outputs` gives them, one row per layer of the host.
        """
        self.adapter, self.layers = adapter, layers
        self._means = means

    @contextmanager
    def active(
        self, inputs: HostInputs | None = None, *, interventions: Interventions | None = None, cached: bool = True
    ) -> Iterator[None]:
        """Put the means in place while the block runs; there are no features to intervene on."""
        if interventions is not None:
            raise ConfigError("A mean-ablated host has no features to intervene on.")
        with self.adapter.replacing(lambda layer, x: self._means[layer].to(x).expand_as(x), self.layers):
            yield
