"""Features kept as they are computed, sparse, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor

from clt.replacement.passes import Passes


@dataclass(frozen=True)
class SampleFeatures:
    """The active features of one sample, over its prompt and every generated token that was read.

    The last generated token is never read by the host and so has no features.
    """

    layer: Integer[Tensor, " entry"]
    position: Integer[Tensor, " entry"]
    """Place in the row, padding not counted."""
    feature: Integer[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    kind: UInt8[Tensor, " position"]
    """`TokenKind` of each position."""
    is_generated: Bool[Tensor, " position"]
    n_layers: int
    n_features: int

    @property
    def n_positions(self) -> int:
        """How many positions were read."""
        return len(self.kind)

    def dense(self, layer: int) -> Float[Tensor, "position feature"]:
        """One layer's activations, 0 where a feature is off."""
        return self.sparse(layer).to_dense()

    def sparse(self, layer: int) -> Tensor:
        """One layer's activations as a sparse COO tensor [position, feature]."""
        here = self.layer == layer
        places = torch.stack([self.position[here], self.feature[here]])
        shape = (self.n_positions, self.n_features)
        return torch.sparse_coo_tensor(places, self.value[here], shape, check_invariants=False).coalesce()


class FeatureRecord:
    """Collects the features of a batch while it runs; on the CPU, so that long answers cost no device memory."""

    def __init__(self, n_layers: int, n_features: int) -> None:
        """Nothing met yet."""
        self._n_layers, self._n_features = n_layers, n_features
        self._entries: list[tuple[Tensor, ...]] = []
        self._places: list[tuple[Tensor, ...]] = []
        self._columns = 0

    def add(self, layer: int, features: Float[Tensor, "token feature"], tokens: slice, passes: Passes) -> None:
        """Keep what is on, of the positions of the pass that were not met before.

        Args:
            tokens: which of the pass's tokens these are, rows one after the other.
        """
        n_columns = passes.columns.stop - passes.columns.start
        token, feature = features.detach().nonzero(as_tuple=True)
        row, column = (token + tokens.start) // n_columns, (token + tokens.start) % n_columns + passes.columns.start
        value = features.detach()[token, feature]
        new = column >= self._columns
        entry = (torch.full_like(row, layer), row, column, feature, value)
        self._entries.append(tuple(each[new].cpu() for each in entry))
        if layer == self._n_layers - 1 and tokens.stop == n_columns * passes.n_rows:
            self._end_pass(passes)

    def _end_pass(self, passes: Passes) -> None:
        """Note what the new columns are."""
        first = self._columns - passes.columns.start
        described = (*passes.described(), passes.kinds())
        self._places.append(tuple(each[:, first:].cpu() for each in described))
        self._columns = passes.columns.stop

    def samples(self) -> list[SampleFeatures]:
        """What was met, row by row, padding left out."""
        layer, row, column, feature, value = (torch.cat(each) for each in zip(*self._entries))
        is_token, is_generated, position, kind = (torch.cat(each, 1) for each in zip(*self._places))
        found = []
        for number in range(len(is_token)):
            mine = (row == number) & is_token[number][column]
            found.append(
                SampleFeatures(
                    layer=layer[mine],
                    position=position[number][column[mine]],
                    feature=feature[mine],
                    value=value[mine],
                    kind=kind[number][is_token[number]],
                    is_generated=is_generated[number][is_token[number]],
                    n_layers=self._n_layers,
                    n_features=self._n_features,
                )
            )
        return found
