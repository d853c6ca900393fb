"""Rows of a graph, many at once: read vectors go in at their layers and positions, one backward pass brings them down.

The linearised host is run once on copies of the prompt, one copy per row of a batch, with every MLP output and the
embeddings as sources. The b-th copy of a gradient belongs to the b-th target, so targets of different layers share a
pass. Whatever reaches a source meets the nodes' vectors there and is dropped; no gradient is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clt.attribution.sources import Sources
from clt.lm.linear import LinearHost
from clt.models import CrossLayerTranscoder

_EMBEDDING = -1


@dataclass(frozen=True)
class Reads:
    """Targets of one batch: what is read, and where."""

    layer: Int64[Tensor, " row"]
    """`n_layers` reads what the unembedding reads."""
    position: Int64[Tensor, " row"]
    vector: Float[Tensor, "row d_model"]

    def __len__(self) -> int:
        return len(self.layer)


class Backward:
    """The linearised host on `batch_size` copies of the prompt, ready to be walked back as often as needed."""

    def __init__(self, linear: LinearHost, transcoder: CrossLayerTranscoder, sources: Sources, batch_size: int) -> None:
        """Run the host once, with gradient."""
        self._sources, self._linear, self._transcoder = sources, linear, transcoder
        self._shape = (batch_size, *linear.embeddings.shape)
        self._rows = torch.empty(0)
        self._pending: Reads | None = None
        self._taps: list[Tensor] = []
        self._skips: dict[int, Tensor] = {}
        with torch.enable_grad():
            self._anchor = torch.zeros((), device=sources.device, requires_grad=True)
            embeddings = self._source(_EMBEDDING, linear.embeddings)
            final = linear.run_for_gradients(embeddings, self._write)
            self._tap(final)

    @torch.no_grad()
    def rows(self, reads: Reads) -> Float[Tensor, "row column"]:
        """Direct effects of all sources on each target."""
        self._rows = torch.zeros(self._sources.n_columns, self._shape[0], device=self._sources.device)
        self._pending = reads
        taps = [self._taps[layer] for layer in sorted(set(reads.layer.tolist()))]
        torch.autograd.grad(taps, [self._anchor], retain_graph=True, allow_unused=True)
        return self._rows[:, : len(reads)].T

    # --- forward ----------------------------------------------------------------------------------------------

    def _write(self, layer: int, x: Tensor) -> Tensor:
        """The true MLP output as a source, except what a skip connection carries, which stays linear in x."""
        self._tap(x)
        add_skips(self._transcoder, layer, x, self._skips)
        skip = self._skips.pop(layer, None)
        if skip is None:
            return self._source(layer, self._linear.writes[layer])
        return self._source(layer, self._linear.writes[layer] - skip[0].detach().to(x.dtype)) + skip.to(x.dtype)

    def _tap(self, x: Tensor) -> None:
        self._taps.append(_Tap.apply(x, len(self._taps), self._injected))  # pyright: ignore[reportArgumentType]

    def _source(self, layer: int, value: Tensor) -> Tensor:
        return _Source.apply(self._anchor, value, self._shape, layer, self._receive)  # pyright: ignore[reportReturnType]

    # --- backward ---------------------------------------------------------------------------------------------

    def _injected(self, layer: int, like: torch.dtype) -> Tensor:
        """The read vectors of one layer at their rows and positions."""
        assert self._pending is not None
        gradient = torch.zeros(self._shape, dtype=like, device=self._sources.device)
        rows = (self._pending.layer == layer).nonzero().squeeze(1)
        gradient[rows, self._pending.position[rows]] = self._pending.vector[rows].to(like)
        return gradient

    def _receive(self, layer: int, gradient: Tensor) -> None:
        if layer == _EMBEDDING:
            self._sources.contract_embeddings(gradient, self._rows)
        else:
            self._sources.contract(layer, gradient, self._rows)


def constants(
    linear: LinearHost, transcoder: CrossLayerTranscoder, sources: Sources
) -> Float[Tensor, "layer_and_final position d_model"]:
    """What is read where no node writes anything: everything that biases alone cause.

    The same affine map at zero embeddings, with what no node writes in place of MLP outputs.
    """
    reads: list[Tensor] = []
    skips: dict[int, Tensor] = {}

    def write(layer: int, x: Tensor) -> Tensor:
        reads.append(x[0].float())
        add_skips(transcoder, layer, x, skips)
        return (sources.constant(layer) + skips.pop(layer, 0)).to(x.dtype).view_as(x)

    with torch.no_grad():
        final = linear.run(torch.zeros_like(linear.embeddings)[None], write)
    return torch.stack([*reads, final[0].float()])


def add_skips(transcoder: CrossLayerTranscoder, source: int, x: Tensor, skips: dict[int, Tensor]) -> None:
    """Add what one layer's skip connections give to the MLP outputs they reach, at ignored positions too."""
    targets = transcoder.config.skip_targets_of(source)
    if not targets:
        return
    for target, part in zip(targets, transcoder.skip(source, x.reshape(-1, x.shape[-1]))):
        skips[target] = skips.get(target, 0) + part.view(x.shape)


class _Tap(torch.autograd.Function):
    """A number that does not depend on what is read; its backward pass starts with the pending read vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: int, injected: Callable[[int, torch.dtype], Tensor]) -> Tensor:
        ctx.layer, ctx.injected, ctx.dtype = layer, injected, x.dtype
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.injected(ctx.layer, ctx.dtype), None, None


class _Source(torch.autograd.Function):
    """A constant, the same for all rows; its gradient is handed over and goes no further."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, shape: Any, layer: int, receive: Callable[[int, Tensor], None]
    ) -> Tensor:
        ctx.layer, ctx.receive = layer, receive
        return value.expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.receive(ctx.layer, grads[0])
        return grads[0].new_zeros((), dtype=torch.float32), None, None, None, None
