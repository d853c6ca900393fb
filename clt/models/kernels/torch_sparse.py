"""The sparse operations in plain torch: always available, and what the others are compared with.

Entries belong to tokens (`offsets`) and name features; sorted by feature, entry j is `order[j]`, and those of feature f
are `bounds[f]` to `bounds[f + 1]`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import embedding_bag

from clt.models.activations import topk_indices


def topk(h: Tensor, scale: Tensor | None, k: int) -> tuple[Float[Tensor, "token k"], Integer[Tensor, "token k"]]:
    """The k entries of each token with the largest h * scale (of equals the first): their h and their features."""
    features = topk_indices(h if scale is None else h * scale, k).sort(1).values
    return h.gather(1, features), features


def take_above(
    h: Float[Tensor, "token feature"], scale: Tensor | None, bound: Float[Tensor, " feature"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every entry with h * scale > bound: h, feature, score; and where each token's begin. A NaN is kept."""
    scores = h if scale is None else h * scale
    keep = ~(scores <= bound)
    features = keep.nonzero()[:, 1]
    offsets = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    return h[keep], features, scores[keep], offsets


def sort_by_feature(features: Integer[Tensor, " entry"], n_features: int) -> tuple[Tensor, Tensor]:
    """`order` and `bounds`; entries of a feature keep their order."""
    # Narrow keys: a radix sort takes a pass per byte. Bounds from the sorted, since bincount waits for the device.
    keys = features.to(torch.int16 if n_features < 2**15 else torch.int32)
    ordered, order = keys.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(n_features + 1, dtype=keys.dtype, device=keys.device))


def add_decoded(
    out: Float[Tensor, "token width"], values: Tensor, features: Tensor, offsets: Tensor, weight: Tensor
) -> None:
    """out += the sum of each token's rows of `weight`, times their values."""
    out += embedding_bag(
        features, weight, offsets, mode="sum", per_sample_weights=values.to(weight.dtype), include_last_offset=True
    )


def entry_dots(
    grad: Float[Tensor, "token width"], weight: Float[Tensor, "feature width"], tokens: Tensor, features: Tensor
) -> Float[Tensor, " entry"]:
    """For each entry, its token's row of `grad` times its feature's row of `weight`."""
    if grad.device.type == "cpu":
        offsets = torch.nn.functional.pad(torch.bincount(tokens, minlength=len(grad)).cumsum(0), (1, 0))
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad.contiguous(), weight, features, offsets, tokens, 0, -1
        )
    return (grad[tokens] * weight[features]).sum(1)


def rows_by_feature(
    values: Tensor, tokens: Tensor, order: Tensor, bounds: Tensor, grad: Float[Tensor, "token width"]
) -> Float[Tensor, "feature width"]:
    """For each feature the rows of `grad` of the tokens it has entries on, times their values."""
    return embedding_bag(
        tokens[order],
        grad.contiguous(),
        bounds,
        mode="sum",
        per_sample_weights=values[order].to(grad.dtype),
        include_last_offset=True,
    )
