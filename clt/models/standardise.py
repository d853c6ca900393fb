"""Bringing every layer to one scale, inside the transcoder.

The transcoder owns its scaling, so its weights mean something without a file of statistics beside them, and nothing
outside (evaluation, replacement, steering, attribution) ever has to undo it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clt.config.clt_config import NormalizationMethod

# Added to standard deviations so that a constant dimension is not divided by zero (crosslayer-coding's value).
_EPSILON = 1e-6


@dataclass(frozen=True)
class ActivationStatistics:
    """Per-layer, per-dimension mean and standard deviation of what the MLPs read and wrote."""

    input_mean: Float[Tensor, "layer d_model"]
    input_std: Float[Tensor, "layer d_model"]
    target_mean: Float[Tensor, "layer d_model"]
    target_std: Float[Tensor, "layer d_model"]


def fit_scaling(
    mean: Float[Tensor, "layer d_model"], std: Float[Tensor, "layer d_model"], method: NormalizationMethod
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, "layer d_model"]]:
    """Shift and scale so that (x - shift) * scale is standardised.

    `rms` brings E||x||² to d_model with one scale per layer (Ameisen et al. 2025); `mean_std` gives every dimension
    mean 0 and variance 1 (crosslayer-coding); `sqrt_d_model` multiplies by sqrt(d_model) whatever the values are, for
    crosslayer-coding's files; `none` leaves the values alone.
    """
    if method == "none":
        return torch.zeros_like(mean), torch.ones_like(mean)
    if method == "sqrt_d_model":
        return torch.zeros_like(mean), torch.full_like(mean, mean.shape[1] ** 0.5)
    if method == "mean_std":
        return mean, 1 / (std + _EPSILON)
    mean_square = (mean.square() + std.square()).mean(1, keepdim=True)
    scale = 1 / (mean_square.sqrt() + _EPSILON)
    return torch.zeros_like(mean), scale.expand_as(mean).clone()
