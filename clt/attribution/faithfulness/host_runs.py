"""Runs of the host, and of its local replacement, with features changed: what predictions are held against.

A feature is changed as circuit-tracer changes it: the difference of its activation times its decoder is added to every
MLP output it writes to; everything else the MLPs do stays theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clt.attribution.sources import written
from clt.lm import HostInputs
from clt.lm.linear import LinearHost
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel

Edit = tuple[int, int, int, float]
"""Layer, position, feature, and the activation it is set to."""


def deltas(
    model: ReplacementModel, reads: Float[Tensor, "layer position d_model"], rows: Sequence[Sequence[Edit]]
) -> Float[Tensor, "layer row position d_model"]:
    """What each row of edits adds to every MLP output."""
    transcoder = model.transcoder
    assert isinstance(transcoder, CrossLayerTranscoder)
    before = transcoder.encode(reads)
    added = torch.zeros(len(reads), len(rows), *reads.shape[1:])
    for row, edits in enumerate(rows):
        for layer, position, feature, value in edits:
            chosen = torch.tensor([feature])
            for target in transcoder.config.targets_of(layer):
                new = written(transcoder, layer, target, chosen, torch.tensor([value]))[0] if value else 0
                old = before[layer, position, feature]
                if old:
                    new = new - written(transcoder, layer, target, chosen, old[None])[0]
                added[target, row, position] += new
    return added


class Run(NamedTuple):
    """What MLPs read and wrote, `[layer, row, position, d_model]`; what was added is in what is read only."""

    reads: Tensor
    wrote: Tensor


@torch.no_grad()
def edited_run(
    model: ReplacementModel,
    inputs: HostInputs,
    added: Float[Tensor, "layer row position d_model"],
    *,
    hold_patterns: bool = False,
) -> tuple[Run, Float[Tensor, "row vocabulary"]]:
    """What the host's own MLPs then do, and its last logits.

    Args:
        hold_patterns: keep the attention patterns of the unchanged prompt.
    """
    n_rows, reads, wrote = added.shape[1], [], []
    held = model.adapter.patterns_of(inputs) if hold_patterns else nullcontext

    def change(layer: int, x: Tensor, y: Tensor) -> Tensor:
        reads.append(x.view(n_rows, -1, x.shape[-1]).clone())
        wrote.append(y.view(n_rows, -1, y.shape[-1]).clone())
        return y + added[layer].view_as(y).to(y.dtype)

    tensors = {name: tensor.repeat(n_rows, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.tensors.items()}
    many = HostInputs(
        tensors=tensors,
        kind=inputs.kind.repeat(n_rows, 1),
        position=inputs.position.repeat(n_rows, 1),
        answer=inputs.answer.repeat(n_rows, 1),
        sample_ids=inputs.sample_ids * n_rows,
    )
    with model.adapter.rewriting(change), held():
        logits = model.adapter.logits(many)[:, -1]
    return Run(torch.stack(reads), torch.stack(wrote)), logits


def edited_logits(
    model: ReplacementModel, inputs: HostInputs, rows: Sequence[Sequence[Edit]]
) -> Float[Tensor, "row vocabulary"]:
    """The host's last logits under each row of edits."""
    reads = model.adapter.capture(inputs).inputs
    return edited_run(model, inputs, deltas(model, reads, rows))[1]


@torch.no_grad()
def predicted_run(
    model: ReplacementModel, linear: LinearHost, added: Float[Tensor, "layer row position d_model"]
) -> Run:
    """What the local replacement model says the MLPs then do.

    Patterns, denominators and errors are held; features are computed anew, layer by layer, and write on.
    """
    transcoder, n_rows = model.transcoder, added.shape[1]
    errors = linear.writes - transcoder.decode(transcoder.encode(linear.reads), linear.reads)
    arriving: dict[int, Tensor] = {}
    reads, wrote = [], []

    def write(layer: int, x: Tensor) -> Tensor:
        reads.append(x)
        flat = x.reshape(-1, x.shape[-1])
        parts = transcoder.contributions(layer, transcoder.encode_layer(layer, flat))
        skips = transcoder.skip(layer, flat)
        for targets, each in (
            (transcoder.config.targets_of(layer), parts),
            (transcoder.config.skip_targets_of(layer), skips),
        ):
            for target, part in zip(targets, each):
                arriving[target] = arriving.get(target, 0) + part.view(x.shape)
        wrote.append(arriving.pop(layer, torch.zeros_like(x)) + transcoder.bias(layer) + errors[layer])
        return wrote[-1] + added[layer]

    linear.run(linear.embeddings.expand(n_rows, -1, -1), write)
    return Run(torch.stack(reads), torch.stack(wrote))
