"""Gradients and counts of all ranks put together, so that every rank takes the step that one rank would take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Integer, Shaped
from torch import Tensor, nn

from clt.models.slices import feature_axis
from clt.parallel.feature_shard import PARTIAL
from clt.parallel.mesh import Mesh

# What each part of a dictionary knows its share of; the others are the same for all parts.
_OVER_FEATURES = frozenset({"sparsity", "preactivation", "fired"})
# Gradients are summed in pieces of about this many numbers: few operations, and no second copy of them all.
_BUCKET = 1 << 24


def reduce_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Sum over the copies of the dictionary; what all parts share is made the same on all of them.

    Every rank's gradients are already weighted by its share of the batch's tokens, so the sum is the batch's mean.
    """
    if mesh.is_alone:
        return
    there = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    for name, grad in there:
        if name.split(".")[0] in PARTIAL:
            mesh.tp.sum_(grad, "shared gradients")
        elif feature_axis(name) is None:
            # Equal already but for the order of sums on some devices; kept in step by construction.
            mesh.tp.broadcast_(grad, "shared gradients")
    if not mesh.dp.is_alone:
        for bucket in _buckets([grad for _, grad in there]):
            _sum_together(bucket, mesh)


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _sum_together(tensors: list[Tensor], mesh: Mesh) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        mesh.dp.sum_(tensors[0], "gradients")
        return
    for dtype in {tensor.dtype for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = mesh.dp.sum_(torch.cat([tensor.reshape(-1) for tensor in same]), "gradients")
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same])):
            tensor.copy_(part.view_as(tensor))


def gradient_norm(model: nn.Module, mesh: Mesh) -> Tensor:
    """Length of the whole dictionary's gradient: every parameter once, wherever it is."""
    if mesh.tp.is_alone:
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(grads, foreach=True)
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts[feature_axis(name) is not None].append(parameter.grad)
    norms = {cut: torch.nn.utils.get_total_norm(grads, foreach=True) for cut, grads in parts.items()}
    square = mesh.tp.sum_(norms[True].double().square(), "gradient norm")
    return (square + norms[False].double().square()).sqrt().to(norms[True].dtype)


def of_all_ranks(
    losses: Mapping[str, Tensor], fired: Integer[Tensor, "layer feature"], mesh: Mesh
) -> tuple[dict[str, Tensor], Integer[Tensor, "layer feature"], Shaped[Tensor, ""]]:
    """The whole batch's losses, how often each feature held here was on, and how often any was.

    Sums over features are known to each part of the dictionary in part, sums over targets in full.
    """
    if mesh.is_alone:
        return dict(losses), fired, fired.sum()
    values = {name: value.double() for name, value in losses.items()} | {"fired": fired.sum().double()}
    here = {name: 1.0 if name in _OVER_FEATURES or mesh.tp.rank == 0 else 0.0 for name in values}
    sums = mesh.world.sum_(torch.stack([value * here[name] for name, value in values.items()]), "losses")
    mesh.dp.sum_(fired, "features fired")
    whole = dict(zip(values, sums.unbind()))
    n_fired = whole.pop("fired")
    return {name: value.to(losses[name].dtype) for name, value in whole.items()}, fired, n_fired
