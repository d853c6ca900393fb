"""A small data set on disk with sparse structure: what trainer, evaluator and command tests train on."""

from pathlib import Path

import torch

from clt.data import ActivationWriter, DatasetInfo, LocalActivationStore
from clt.types import ActivationBatch


def sparse_batch(layers=3, tokens=600, width=8, sources=20, seed=0):
    """Inputs and targets that are the same sparse combination of random directions, different in each layer."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.Generator().manual_seed(1234)
    on = (torch.rand(tokens, sources, generator=rng) < 0.15) * torch.rand(tokens, sources, generator=rng)
    sides = [torch.stack([on @ torch.randn(sources, width, generator=directions) for _ in range(layers)]) for _ in "xy"]
    return ActivationBatch(
        inputs=sides[0],
        targets=sides[1],
        kind=torch.arange(tokens, dtype=torch.uint8) % 2,
        sample=torch.arange(tokens) // 10,
        position=torch.arange(tokens) % 10,
    )


def write_data(folder: Path, seed: int = 0, **sizes) -> Path:
    """The batch as a data set."""
    batch = sparse_batch(seed=seed, **sizes)
    info = DatasetInfo(
        model_name="tiny", dataset="sparse", split="train", num_layers=batch.n_layers, d_model=batch.d_model
    )
    with ActivationWriter(folder, info, shard_tokens=200) as writer:
        writer.append(batch)
    return folder


def store_of(folder: Path, tokens: int = 64) -> LocalActivationStore:
    """A store over it."""
    return LocalActivationStore(folder, batch_size_tokens=tokens)
