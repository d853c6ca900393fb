"""Small activations made from a seed."""

from collections.abc import Callable

import pytest
import torch

from clt.data import DatasetInfo
from clt.types import ActivationBatch, Hookpoint


def make_batch(tokens: int, layers: int = 3, width: int = 4, seed: int = 0, first_sample: int = 0) -> ActivationBatch:
    """Random activations whose `sample` numbers the tokens, so that each row can be recognised."""
    rng = torch.Generator().manual_seed(seed)
    return ActivationBatch(
        inputs=torch.randn(layers, tokens, width, generator=rng),
        targets=torch.randn(layers, tokens, width, generator=rng),
        kind=torch.randint(0, 3, (tokens,), generator=rng, dtype=torch.uint8),
        sample=torch.arange(first_sample, first_sample + tokens),
        position=torch.arange(tokens, dtype=torch.int32),
    )


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., ActivationBatch]:
    return make_batch


@pytest.fixture(scope="session")
def info() -> DatasetInfo:
    return DatasetInfo(
        model_name="tiny",
        dataset="made up",
        split="train",
        num_layers=3,
        d_model=4,
        hookpoints=tuple(Hookpoint(layer, f"h.{layer}.mlp.input", f"h.{layer}.mlp.output") for layer in range(3)),
        provenance={"context_size": 8},
    )
