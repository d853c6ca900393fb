"""What the nodes of a prompt write: active features, errors, embeddings; and their product with a gradient.

A feature of layer s at position p writes one vector into the MLP output of each layer it reaches: one *pair*. The
pairs of a layer are kept in order of position, so that all of a (layer, position) meet the gradient there in one
matrix product. Circuit-tracer gathers the gradient per pair instead, which costs thirty times as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clt.lm.linear import LinearHost
from clt.models import CrossLayerTranscoder

# Vectors of pairs are kept up to this size; beyond it they are made again for each use.
_KEPT_BYTES = 1.5e9
# Vectors of pairs that are made again for each use are made this many numbers at a time (128 MB in fp32).
_BLOCK_NUMBERS = 32_000_000


@dataclass(frozen=True)
class ActiveFeatures:
    """Every feature that fires on the prompt, by layer, position, feature."""

    layer: Int64[Tensor, " active"]
    position: Int64[Tensor, " active"]
    feature: Int64[Tensor, " active"]
    value: Float[Tensor, " active"]

    def __len__(self) -> int:
        return len(self.layer)


def active_features(linear: LinearHost, transcoder: CrossLayerTranscoder, ignored_positions: int) -> ActiveFeatures:
    """Encode what the host's MLPs read, layer by layer, and keep what is not 0."""
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for layer, reads in enumerate(linear.reads):
        activations = transcoder.encode_layer(layer, reads)
        activations[:ignored_positions] = 0
        position, feature = activations.nonzero(as_tuple=True)
        found.append((torch.full_like(position, layer), position, feature, activations[position, feature].float()))
    return ActiveFeatures(*(torch.cat(column) for column in zip(*found, strict=True)))


class Sources:
    """The vectors of all nodes and their columns: active features, errors (layer-major), embeddings."""

    def __init__(
        self,
        linear: LinearHost,
        transcoder: CrossLayerTranscoder,
        active: ActiveFeatures,
        ignored_positions: int,
    ) -> None:
        """Sort the pairs, keep their vectors if there are few enough, and compute the errors."""
        self.active, self._linear, self._transcoder = active, linear, transcoder
        self.ignored_positions = ignored_positions
        self.n_layers, self.n_positions, self.d_model = linear.reads.shape
        self.device = linear.reads.device
        self._pairs = [self._pairs_of(target) for target in range(self.n_layers)]
        n_pairs = sum(len(pairs) for pairs, _ in self._pairs)
        self._kept: dict[int, Tensor] = {}
        if n_pairs * self.d_model * 4 <= _KEPT_BYTES:
            self._kept = {k: self._vectors(k, 0, len(pairs)) for k, (pairs, _) in enumerate(self._pairs)}
        self.skips = skip_outputs(transcoder, linear.reads)
        self.errors = torch.stack([self._error(target) for target in range(self.n_layers)])
        self.embeddings = linear.embeddings.float()

    @property
    def first_error(self) -> int:
        """Column of the first error."""
        return len(self.active)

    @property
    def first_embedding(self) -> int:
        """Column of the first embedding."""
        return self.first_error + self.n_layers * self.n_positions

    @property
    def n_columns(self) -> int:
        """Features, errors, embeddings."""
        return self.first_embedding + self.n_positions

    def constant(self, target: int) -> Float[Tensor, "position d_model"]:
        """What no node writes: the decoder bias; at ignored positions the true MLP output."""
        bias = self._transcoder.bias(target).float().expand(self.n_positions, -1).clone()
        bias[: self.ignored_positions] = self._linear.writes[target][: self.ignored_positions].float()
        return bias

    def contract(
        self, target: int, gradient: Float[Tensor, "row position d_model"], rows: Float[Tensor, "column row"]
    ) -> None:
        """Add what every pair and error of one MLP output gives to each row of targets.

        Args:
            gradient: of each row's target, with respect to the MLP output of layer `target`.
            rows: the rows so far, transposed; changed in place.
        """
        at = gradient.transpose(0, 1).float().contiguous()
        pairs, starts = self._pairs[target]
        for low, high in self._blocks(target):
            vectors = self._kept[target][low:high] if target in self._kept else self._vectors(target, low, high)
            product = torch.empty(high - low, at.shape[1], device=self.device)
            for position, begin, end in _inside(starts, low, high):
                torch.mm(vectors[begin - low : end - low], at[position].T, out=product[begin - low : end - low])
            rows.index_add_(0, pairs[low:high], product)
        first = self.first_error + target * self.n_positions
        rows[first : first + self.n_positions] = torch.einsum("prd,pd->pr", at, self.errors[target])

    def contract_embeddings(
        self, gradient: Float[Tensor, "row position d_model"], rows: Float[Tensor, "column row"]
    ) -> None:
        """Add what every embedding gives."""
        rows[self.first_embedding :] = torch.einsum("rpd,pd->pr", gradient.float(), self.embeddings)

    # --- pairs ------------------------------------------------------------------------------------------------

    def _pairs_of(self, target: int) -> tuple[Int64[Tensor, " pair"], list[int]]:
        """The active features that write to a layer, by position, and where each position starts."""
        sources = torch.tensor(list(self._transcoder.config.sources_of(target)), device=self.device)
        writes = torch.isin(self.active.layer, sources).nonzero().squeeze(1)
        position, order = self.active.position[writes].sort(stable=True)
        ends = torch.searchsorted(position, torch.arange(self.n_positions + 1, device=self.device))
        return writes[order], ends.tolist()

    def _blocks(self, target: int) -> Iterator[tuple[int, int]]:
        """Consecutive pairs, whole positions, of a bounded number of numbers."""
        _, starts = self._pairs[target]
        limit = max(1, _BLOCK_NUMBERS // self.d_model)
        low = 0
        for before, end in pairwise(starts):
            if end - low > limit and before > low:
                yield low, before
                low = before
        if starts[-1] > low:
            yield low, starts[-1]

    def _vectors(self, target: int, low: int, high: int) -> Float[Tensor, "pair d_model"]:
        """What some pairs of a layer write."""
        chosen = self._pairs[target][0][low:high]
        layers, features, values = self.active.layer[chosen], self.active.feature[chosen], self.active.value[chosen]
        vectors = torch.empty(high - low, self.d_model, device=self.device)
        for source in self._transcoder.config.sources_of(target):
            here = (layers == source).nonzero().squeeze(1)
            if len(here):
                vectors[here] = written(self._transcoder, source, target, features[here], values[here])
        return vectors

    def _error(self, target: int) -> Float[Tensor, "position d_model"]:
        """True MLP output minus everything that features, biases and skip connections write."""
        rest = self._linear.writes[target].float() - self.constant(target) - self.skips[target]
        for low, high in self._blocks(target):
            vectors = self._kept[target][low:high] if target in self._kept else self._vectors(target, low, high)
            rest.index_add_(0, self.active.position[self._pairs[target][0][low:high]], vectors, alpha=-1)
        rest[: self.ignored_positions] = 0
        return rest


def written(
    transcoder: CrossLayerTranscoder,
    source: int,
    target: int,
    features: Int64[Tensor, " kept"],
    values: Float[Tensor, " kept"],
) -> Float[Tensor, "kept d_model"]:
    """What features of these activations write to one MLP output, in the host's units.

    Offsets count as part of what a feature writes: without the feature neither would be there.
    """
    decoders, place = transcoder.decoders, target - transcoder.config.targets_of(source).start
    offset, scale = decoders.post.offset(source, features), decoders.post.scale(source, features)
    amount = values if offset is None else values + offset[place].float()
    amount = amount if scale is None else amount * scale[place].float()
    return decoders.matrix(source, target)[features].float() * amount[:, None] / transcoder.target_scale[target]


def skip_outputs(
    transcoder: CrossLayerTranscoder, reads: Float[Tensor, "layer *row d_model"]
) -> list[Float[Tensor, "*row d_model"] | float]:
    """What the skip connections add to each MLP output."""
    total: list[Tensor | float] = [0.0] * len(reads)
    for source, x in enumerate(reads):
        targets = transcoder.config.skip_targets_of(source)
        for target, part in zip(targets, transcoder.skip(source, x.reshape(-1, x.shape[-1]))):
            total[target] = total[target] + part.view(x.shape).float()
    return total


def _inside(starts: list[int], low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """Positions with pairs between `low` and `high`, and where their pairs begin and end."""
    for position, (begin, end) in enumerate(pairwise(starts)):
        if low <= begin < end <= high:
            yield position, begin, end
