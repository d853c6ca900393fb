"""Acting on the host itself: through a transcoder's decoders with the errors kept, or on true neurons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from clt.lm import HostInputs, ModelAdapter
from clt.models import BaseTranscoder
from clt.replacement.intervention import Edit, Interventions
from clt.replacement.loading import check_fit
from clt.replacement.passes import Passes
from clt.replacement.statistics import check_std
from clt.replacement.steerable import Steerable


class SteeredHost(Steerable):
    """The host, plus what interventions on features change in the transcoder's predictions.

    MLP output + decode(features after) - decode(features before): whatever the transcoder misses stays as it is, so
    without interventions this is the host, to the bit, however good the transcoder.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        transcoder: BaseTranscoder,
        *,
        feature_std: Float[Tensor, "layer feature"] | None = None,
    ) -> None:
        """Check that host and transcoder belong together.

        Raises:
            HostModelError: layers, width or hookpoints differ.
        """
        check_fit(adapter, transcoder.config)
        check_std(feature_std, transcoder.config)
        self.adapter, self.transcoder, self.feature_std = adapter, transcoder, feature_std
        self.layers = range(adapter.n_layers)

    @contextmanager
    def active(
        self, inputs: HostInputs | None = None, *, interventions: Interventions | None = None, cached: bool = True
    ) -> Iterator[None]:
        """Steer the host while the block runs; arguments as `Steerable.active`."""
        passes = Passes(self.adapter, inputs, cached=cached)
        running = RunningDifference(self.transcoder, self.edit(interventions, passes))
        with passes.watching(), self.adapter.rewriting(running.change):
            yield

    def edit(self, interventions: Interventions | None, passes: Passes) -> Edit:
        """The interventions, checked against the transcoder's sizes."""
        config = self.transcoder.config
        return Edit(interventions, passes, [config.num_features] * config.num_layers, self.feature_std)


class RunningDifference:
    """Adds to each MLP output what the interventions met so far in the pass write to it."""

    def __init__(self, transcoder: BaseTranscoder, edit: Edit) -> None:
        """Before the first layer."""
        self._transcoder, self._edit = transcoder, edit
        self._sums: dict[int, Tensor] = {}

    def change(self, layer: int, mlp_input: Tensor, mlp_output: Tensor) -> Tensor:
        """One layer's MLP output, steered; layers are to be called in order."""
        if layer == 0:
            self._sums.clear()
        if self._edit.touches(layer):
            self._spend(layer, mlp_input)
        if layer not in self._sums:
            return mlp_output
        return mlp_output + self._sums.pop(layer).to(mlp_output).view_as(mlp_output)

    def _spend(self, source: int, mlp_input: Tensor) -> None:
        tokens = mlp_input.reshape(-1, mlp_input.shape[-1]).to(self._transcoder.bias(source).device)
        before = self._transcoder.encode_layer(source, tokens)
        # A plain callable may change features in place: compare with a copy of its own.
        after = self._edit.apply(source, before)
        for target, part in zip(self._transcoder.config.targets_of(source), self._difference(source, before, after)):
            self._sums[target] = self._sums[target] + part if target in self._sums else part

    def _difference(self, source: int, before: Tensor, after: Tensor) -> Float[Tensor, "target token d_model"]:
        """decode(after) - decode(before); features write independently, so only the changed ones are decoded."""
        write = self._transcoder.contributions
        if self._transcoder.writes_linearly:
            return write(source, after - before)
        if after.requires_grad:
            # A gradient is to reach features that are not changed yet, too.
            return write(source, after) - write(source, before)
        changed = before != after
        zero = torch.zeros_like(before)
        return write(source, torch.where(changed, after, zero)) - write(source, torch.where(changed, before, zero))


class SteeredNeurons(Steerable):
    """The host with neurons of its MLPs' hidden layers changed; an intervention's `feature` is the neuron's number.

    What is changed is what enters the layer that leads back to the residual stream, so scaling neuron n by 2
    scales its whole contribution, W_down[:, n] times its activation, by 2.
    """

    def __init__(self, adapter: ModelAdapter, *, neuron_std: Float[Tensor, "layer feature"] | None = None) -> None:
        """Find the neurons.

        Raises:
            HostModelError: an MLP has no such layer (a mixture of experts).
        """
        self.adapter, self.neuron_std = adapter, neuron_std
        self._widths = adapter.neuron_counts

    @contextmanager
    def active(
        self, inputs: HostInputs | None = None, *, interventions: Interventions | None = None, cached: bool = True
    ) -> Iterator[None]:
        """Change neurons while the block runs; arguments as `Steerable.active`."""
        passes = Passes(self.adapter, inputs, cached=cached)
        edit = Edit(interventions, passes, self._widths, self.neuron_std, what="neuron")

        def change(layer: int, hidden: Tensor) -> Tensor:
            return edit.apply(layer, hidden.reshape(-1, hidden.shape[-1])).view_as(hidden)

        layers = range(self.adapter.n_layers) if edit.layers is None else edit.layers
        with passes.watching(), self.adapter.rewriting_neurons(change, layers):
            yield
