"""How much each feature varies on a host's own activations; the unit of interventions in standard deviations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import ConfigError
from clt.lm import ModelAdapter
from clt.models import BaseTranscoder
from clt.models.checkpoint import read_tensors, save_tensors
from clt.types import Sample

FILE = "feature_std.safetensors"


@torch.no_grad()
def feature_std(
    adapter: ModelAdapter, transcoder: BaseTranscoder, samples: Sequence[Sample], batch_size: int = 16
) -> Float[Tensor, "layer feature"]:
    """Standard deviation over all tokens of the samples, those where the feature is off included.

    Raises:
        HostModelError: there are no samples.
    """
    shape = (transcoder.config.num_layers, transcoder.config.num_features)
    total, squares = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    n_tokens = 0
    for start in range(0, max(len(samples), 1), batch_size):
        batch = adapter.capture(adapter.prepare(samples[start : start + batch_size]))
        n_tokens += batch.n_tokens
        for layer, x in enumerate(batch.inputs):
            active = transcoder.encode_layer(layer, x).double()
            total[layer] += active.sum(0).cpu()
            squares[layer] += active.square().sum(0).cpu()
    variance = squares / n_tokens - (total / n_tokens).square()
    return variance.clamp_min(0).sqrt().float()


def save_feature_std(folder: Path, std: Float[Tensor, "layer feature"]) -> None:
    """Keep it beside the transcoder, where `ReplacementModel.from_pretrained` looks."""
    save_tensors({"std": std}, folder / FILE)


def read_feature_std(folder: Path) -> Float[Tensor, "layer feature"] | None:
    """What `save_feature_std` wrote; None if it did not."""
    path = folder / FILE
    return read_tensors(path)["std"] if path.is_file() else None


def check_std(std: Tensor | None, config: CLTConfig) -> None:
    """Refuse standard deviations of another transcoder."""
    if std is not None and std.shape != (config.num_layers, config.num_features):
        raise ConfigError(
            f"feature_std is {tuple(std.shape)}, but the transcoder has {config.num_layers} layers of "
            f"{config.num_features} features. It was measured with another transcoder."
        )
