"""Steering one prompt of a host with parts of it held at the unsteered run, in circuit-tracer's four ways.

    mode         held                                             features the change starts from
    direct       attention patterns, norm denominators, MLPs      those of the unsteered run
    constrained  patterns; MLPs of the constrained layers         those of the unsteered run
    iterative    patterns                                         those at hand
    free         nothing                                          those at hand

In `direct` only the straight paths from decoder to reading site are left, all linear: what attribution graphs
predict. `constrained` writes inside the constrained layers only and lets what follows react (constrained patching);
`iterative` lets MLPs and norms react everywhere. Source: Ameisen et al. 2025, "Circuit Tracing", interventions; the
modes are those of circuit-tracer's `feature_intervention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clt.errors import ConfigError
from clt.lm import HostInputs
from clt.lm.hooks import Change
from clt.replacement.host import RunningDifference, SteeredHost
from clt.replacement.intervention import Edit, Interventions
from clt.replacement.passes import Passes

Mode = Literal["free", "iterative", "constrained", "direct"]


@torch.no_grad()
def steered_logits(
    steered: SteeredHost,
    inputs: HostInputs,
    interventions: Interventions,
    mode: Mode,
    constrained_layers: Sequence[int] | None = None,
) -> Float[Tensor, "row position vocabulary"]:
    """Logits at all positions of one prompt.

    Args:
        inputs: one row without padding (any number for `free`).
        constrained_layers: with `constrained`: consecutive layers; their MLPs are held and only they are written to.

    Returns:
        As the host gives them; in `direct` without a soft-cap on the logits, which would not be linear.

    Raises:
        ConfigError: an unknown mode, or constrained layers without that mode or the other way round.
        HostModelError: several rows, padding, or a host whose attention patterns cannot be held.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode = {mode!r} is not one of {', '.join(map(repr, get_args(Mode)))}.")
    if (mode == "constrained") != (constrained_layers is not None):
        raise ConfigError(f"mode = {mode!r} with constrained_layers = {constrained_layers}: the two go together.")
    adapter = steered.adapter
    passes = Passes(adapter, inputs)
    edit = steered.edit(interventions, passes)
    if mode == "direct":
        return _direct(steered, inputs, edit, passes)
    hold = nullcontext if mode == "free" else adapter.patterns_of(inputs)
    running = RunningDifference(steered.transcoder, edit)
    change = running.change
    if constrained_layers is not None:
        change = _constrained(
            steered, inputs, edit, passes, range(min(constrained_layers), max(constrained_layers) + 1)
        )
    # Counted anew: the passes that recorded something were not those of the steered run.
    passes.restart()
    with hold(), passes.watching(), adapter.rewriting(change):
        return adapter.logits(inputs)


def baseline_differences(
    steered: SteeredHost, edit: Edit, reads: Float[Tensor, "layer token d_model"]
) -> Float[Tensor, "layer token d_model"]:
    """What the interventions write to each MLP output if the features are those of the unsteered run."""
    running = RunningDifference(steered.transcoder, edit)
    return torch.stack([running.change(layer, x, torch.zeros_like(x)) for layer, x in enumerate(reads)])


def _direct(steered: SteeredHost, inputs: HostInputs, edit: Edit, passes: Passes) -> Tensor:
    adapter = steered.adapter
    linear = adapter.linearised(inputs)
    passes.begin(inputs.input_ids)
    writes = linear.writes + baseline_differences(steered, edit, linear.reads).to(linear.writes)
    final = linear.run(linear.embeddings[None], lambda layer, x: writes[layer][None])
    head: Any = adapter.model.get_output_embeddings()
    return head(final)


def _constrained(steered: SteeredHost, inputs: HostInputs, edit: Edit, passes: Passes, layers: range) -> Change:
    """What an MLP puts out: the unsteered value and what is written, in the range; what it likes, elsewhere."""
    adapter = steered.adapter
    with adapter.capturing() as captured:
        adapter.logits(inputs)
    shape = (adapter.n_layers, -1, adapter.d_model)
    passes.begin(inputs.input_ids)
    differences = baseline_differences(steered, edit, captured.inputs.reshape(shape))
    held = captured.targets.reshape(shape) + differences.to(captured.targets)

    def change(layer: int, x: Tensor, y: Tensor) -> Tensor:
        return held[layer].view_as(y) if layer in layers else y

    return change
