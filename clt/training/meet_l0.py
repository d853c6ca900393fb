"""The last step towards a target L0: all thresholds times one factor.

A steered sparsity weight brings L0 near its target but not onto it: while the learning rate falls to zero thresholds
stop following the weight. What is missing then is little, and one factor on all of them leaves the share of each layer
as training found it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Integer
from torch import Tensor

from clt.models import CrossLayerTranscoder
from clt.parallel.mesh import Mesh, mesh_of_one
from clt.types import ActivationBatch

# Factors looked at: 1/4 to 4, in steps of 0.07 %.
_REACH, _BINS = math.log(4.0), 4000


@torch.no_grad()
def factor_for_l0(
    model: CrossLayerTranscoder,
    batches: Iterable[ActivationBatch],
    target: float,
    n_tokens: int,
    mesh: Mesh | None = None,
) -> tuple[float, dict[str, float]]:
    """The factor on all thresholds at which a JumpReLU transcoder has the target L0, and what was counted.

    Args:
        batches: as many as it takes are read; never more than one is held.
        target: features per token and layer, on average over layers.
        n_tokens: how many tokens to count on, over all copies of the dictionary.
        mesh: the ranks; each gives its features and its rows of every batch, and all get the same answer.

    Returns:
        1 if no factor between 1/4 and 4 gets as close as a tenth of the target; and the numbers `calibration/...`.
    """
    mesh, device = mesh or mesh_of_one(), model.b_dec.device
    counts, n_counted = torch.zeros(_BINS + 1, dtype=torch.int64, device=device), 0
    for batch in batches:
        counts += _ratios(model, batch.to(device))
        n_counted += mesh.dp.total(batch.n_tokens, "tokens", device)
        if n_counted >= n_tokens:
            break
    counts = mesh.world.sum_(counts, "thresholds for the target L0").cpu()
    # Features on at the factor of each edge: all entries whose h / theta lies above it.
    on = counts.flip(0).cumsum(0).flip(0)
    l0 = on.double() / (n_counted * model.config.num_layers)
    edge = int((l0 - target).abs().argmin())
    before, after = float(l0[_BINS // 2]), float(l0[edge])
    factor = math.exp(_REACH * (2 * edge / _BINS - 1))
    if abs(after - target) > 0.1 * target:
        factor, after = 1.0, before
    counted = {"factor": factor, "l0_before": before, "l0_after": after, "tokens": n_counted}
    return factor, {f"calibration/{name}": float(value) for name, value in counted.items()}


def _ratios(model: CrossLayerTranscoder, batch: ActivationBatch) -> Integer[Tensor, " bin"]:
    """How often h / theta falls in each bin of its logarithm, and, last, how often beyond them."""
    counts = torch.zeros(_BINS + 1, dtype=torch.int64, device=model.b_dec.device)
    for layer, x in enumerate(batch.inputs):
        h = model.preactivation(layer, model.standardise_inputs(layer, x)).float()
        ratio = (h / model.threshold(layer).float()).clamp_min(math.exp(-2 * _REACH)).log()
        counts[:-1] += torch.histc(ratio, _BINS, -_REACH, _REACH).long()
        counts[-1] += (ratio > _REACH).sum()
    return counts


@torch.no_grad()
def scale_thresholds(model: CrossLayerTranscoder, factor: float) -> None:
    """Multiply every threshold."""
    for row in model.log_threshold:
        row += math.log(factor)
