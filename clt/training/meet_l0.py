"""The last step towards a target L0: all thresholds times one factor.

A steered sparsity weight brings L0 near its target but not onto it: while the learning rate falls to zero thresholds
stop following the weight. What is missing then is little, and one factor on all of them leaves the share of each layer
as training found it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from clt.models import CrossLayerTranscoder
from clt.types import ActivationBatch

# Factors looked at: 1/4 to 4, in steps of 0.07 %.
_REACH, _BINS = math.log(4.0), 4000


@torch.no_grad()
def factor_for_l0(
    model: CrossLayerTranscoder, batches: Iterable[ActivationBatch], target: float, n_tokens: int
) -> tuple[float, dict[str, float]]:
    """The factor on all thresholds at which a JumpReLU transcoder has the target L0, and what was counted.

    Args:
        batches: as many as it takes are read; never more than one is held.
        target: features per token and layer, on average over layers.
        n_tokens: how many tokens to count on.

    Returns:
        1 if no factor between 1/4 and 4 gets as close as a tenth of the target; and the numbers `calibration/...`.
    """
    counts, always, n_counted = torch.zeros(_BINS, dtype=torch.int64), 0, 0
    for batch in batches:
        near, above = _ratios(model, batch.to(model.b_dec.device))
        counts += near
        always += above
        n_counted += batch.n_tokens
        if n_counted >= n_tokens:
            break
    # Features on at the factor of each edge: all entries whose h / theta lies above it.
    on = torch.cat([counts.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.int64)]) + always
    l0 = on.double() / (n_counted * model.config.num_layers)
    edge = int((l0 - target).abs().argmin())
    before, after = float(l0[_BINS // 2]), float(l0[edge])
    factor = math.exp(_REACH * (2 * edge / _BINS - 1))
    if abs(after - target) > 0.1 * target:
        factor, after = 1.0, before
    counted = {"factor": factor, "l0_before": before, "l0_after": after, "tokens": n_counted}
    return factor, {f"calibration/{name}": float(value) for name, value in counted.items()}


def _ratios(model: CrossLayerTranscoder, batch: ActivationBatch) -> tuple[Tensor, int]:
    """How often h / theta falls in each bin of its logarithm, and how often beyond the last."""
    counts, above = torch.zeros(_BINS, dtype=torch.int64), 0
    for layer, x in enumerate(batch.inputs):
        h = model.preactivation(layer, model.standardise_inputs(layer, x)).float()
        ratio = (h / model.threshold(layer).float()).clamp_min(math.exp(-2 * _REACH)).log()
        counts += torch.histc(ratio, _BINS, -_REACH, _REACH).long().cpu()
        above += int((ratio > _REACH).sum())
    return counts, above


@torch.no_grad()
def scale_thresholds(model: CrossLayerTranscoder, factor: float) -> None:
    """Multiply every threshold."""
    for row in model.log_threshold:
        row += math.log(factor)
