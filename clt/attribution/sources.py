"""What the nodes of a prompt write: active features, errors, embeddings; and their product with a gradient.

A feature of layer s at position p writes one vector into the MLP output of each layer it reaches: one *pair*. The
pairs of a layer are kept in order of position, so that all of a (layer, position) meet the gradient there in one
matrix product. Circuit-tracer gathers the gradient per pair instead, which costs thirty times as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clt.lm.linear import LinearHost
from clt.models import CrossLayerTranscoder

# Vectors of pairs are kept up to this size; beyond it they are made again for each use.
_KEPT_BYTES = 1.5e9
# Vectors of pairs that are made again for each use are made this many numbers at a time: what a processor's cache
# holds, or (128 MB in fp32) enough to keep a GPU busy.
_BLOCK_NUMBERS = {"cpu": 2_000_000, "cuda": 32_000_000}


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


@dataclass(frozen=True)
class Pairs:
    """The active features that write to one layer, by position."""

    numbers: Int64[Tensor, " pair"]
    """Of the active feature."""
    amounts: Float[Tensor, " pair"]
    """What its row of the decoder is multiplied by."""
    starts: list[int]
    """Where the pairs of each position begin; last, how many there are."""


class Sources:
    """The vectors of all nodes and their columns: active features, errors (layer-major), embeddings."""

    def __init__(
        self,
        linear: LinearHost,
        transcoder: CrossLayerTranscoder,
        active: ActiveFeatures,
        ignored_positions: int,
    ) -> None:
        """Sort the pairs, keep their decoder rows if there are few enough, and compute the errors."""
        self.active, self._linear, self._transcoder = active, linear, transcoder
        self.ignored_positions = ignored_positions
        self.n_layers, self.n_positions, self.d_model = linear.reads.shape
        self.device = linear.reads.device
        self.pairs = [self._pairs_of(target) for target in range(self.n_layers)]
        self._kept: dict[int, Tensor] = {}
        if self.n_pairs * self.d_model * 4 <= _KEPT_BYTES:
            self._kept = {k: self._made(k, 0, len(pairs.numbers)) for k, pairs in enumerate(self.pairs)}
        self.skips = skip_outputs(transcoder, linear.reads)
        self.errors = torch.stack([self._error(target) for target in range(self.n_layers)])
        self.embeddings = linear.embeddings.float()

    @property
    def n_pairs(self) -> int:
        """Of a feature and a layer it writes to."""
        return sum(len(pairs.numbers) for pairs in self.pairs)

    @property
    def kept_bytes(self) -> int:
        """Size of the decoder rows that are kept."""
        return sum(vectors.numel() * vectors.element_size() for vectors in self._kept.values())

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
        """What no node writes: the decoder bias; at ignored positions all of the MLP output but skip connections."""
        bias = self._transcoder.bias(target).float().expand(self.n_positions, -1).clone()
        rest = self._linear.writes[target].float() - self.skips[target]
        bias[: self.ignored_positions] = rest[: self.ignored_positions]
        return bias

    def contract(
        self, target: int, gradient: Float[Tensor, "row position d_model"], rows: Float[Tensor, "column row"]
    ) -> None:
        """Add what every pair and error of one MLP output gives to each row of targets.

        Args:
            gradient: of each row's target, with respect to the MLP output of layer `target`.
            rows: the rows so far, transposed; changed in place.
        """
        at = gradient.transpose(0, 1).float()
        first = self.first_error + target * self.n_positions
        rows[first : first + self.n_positions] = torch.einsum("prd,pd->pr", at, self.errors[target])
        reached = at.any(-1).any(-1).tolist()
        at = (at / self._transcoder.target_scale[target]).contiguous()
        pairs = self.pairs[target]
        for low, high, begin, end in self._blocks(target, reached):
            vectors = self.rows_of(target, begin, end)
            product = torch.empty(end - begin, at.shape[1], device=self.device)
            for position in range(low, high):
                here = slice(pairs.starts[position] - begin, pairs.starts[position + 1] - begin)
                torch.mm(vectors[here], at[position].T, out=product[here])
            rows.index_add_(0, pairs.numbers[begin:end], product.mul_(pairs.amounts[begin:end, None]))

    def contract_embeddings(
        self, gradient: Float[Tensor, "row position d_model"], rows: Float[Tensor, "column row"]
    ) -> None:
        """Add what every embedding gives."""
        rows[self.first_embedding :] = torch.einsum("rpd,pd->pr", gradient.float(), self.embeddings)

    # --- pairs ------------------------------------------------------------------------------------------------

    def _pairs_of(self, target: int) -> Pairs:
        """The active features that write to a layer, by position."""
        sources = torch.tensor(list(self._transcoder.config.sources_of(target)), device=self.device)
        writes = torch.isin(self.active.layer, sources).nonzero().squeeze(1)
        position, order = self.active.position[writes].sort(stable=True)
        starts = torch.searchsorted(position, torch.arange(self.n_positions + 1, device=self.device))
        numbers = writes[order]
        amounts = torch.empty(len(numbers), device=self.device)
        for source, here in self._by_source(target, numbers):
            features, values = self.active.feature[numbers[here]], self.active.value[numbers[here]]
            amounts[here] = amounts_of(self._transcoder, source, target, features, values)
        return Pairs(numbers, amounts, starts.tolist())

    def _by_source(self, target: int, numbers: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The layers that write to another, and which of some pairs come from each."""
        layers = self.active.layer[numbers]
        for source in self._transcoder.config.sources_of(target):
            here = (layers == source).nonzero().squeeze(1)
            if len(here):
                yield source, here

    def _blocks(self, target: int, reached: Sequence[bool]) -> Iterator[tuple[int, int, int, int]]:
        """Consecutive positions that are reached and their pairs, a bounded number of numbers at a time."""
        starts = self.pairs[target].starts
        limit = max(1, _BLOCK_NUMBERS["cpu" if self.device.type == "cpu" else "cuda"] // self.d_model)
        low = 0
        for position in range(self.n_positions + 1):
            is_end = position == self.n_positions or not reached[position]
            if starts[position] > starts[low] and (is_end or starts[position + 1] - starts[low] > limit):
                yield low, position, starts[low], starts[position]
                low = position
            if is_end:
                low = position + 1

    def rows_of(self, target: int, begin: int, end: int) -> Float[Tensor, "pair d_model"]:
        """The decoder rows of some pairs of a layer, kept or made again."""
        return self._kept[target][begin:end] if target in self._kept else self._made(target, begin, end)

    def _made(self, target: int, begin: int, end: int) -> Float[Tensor, "pair d_model"]:
        numbers, decoders = self.pairs[target].numbers[begin:end], self._transcoder.decoders
        vectors = torch.empty(end - begin, self.d_model, device=self.device)
        for source, here in self._by_source(target, numbers):
            vectors[here] = decoders.rows(source, target, self.active.feature[numbers[here]]).float()
        return vectors

    def _error(self, target: int) -> Float[Tensor, "position d_model"]:
        """True MLP output minus everything that features, biases and skip connections write."""
        rest = self._linear.writes[target].float() - self.constant(target) - self.skips[target]
        pairs, scale = self.pairs[target], self._transcoder.target_scale[target]
        for _, _, begin, end in self._blocks(target, [True] * self.n_positions):
            written = self.rows_of(target, begin, end) * pairs.amounts[begin:end, None] / scale
            rest.index_add_(0, self.active.position[pairs.numbers[begin:end]], written, alpha=-1)
        rest[: self.ignored_positions] = 0
        return rest


def amounts_of(
    transcoder: CrossLayerTranscoder,
    source: int,
    target: int,
    features: Int64[Tensor, " kept"],
    values: Float[Tensor, " kept"],
) -> Float[Tensor, " kept"]:
    """What the decoder rows of features of these activations are multiplied by on their way to one MLP output.

    Offsets count as part of what a feature writes: without the feature neither would be there.
    """
    post, place = transcoder.decoders.post, target - transcoder.config.targets_of(source).start
    offset, scale = post.offset(source, features), post.scale(source, features)
    amount = values if offset is None else values + offset[place].float()
    return amount if scale is None else amount * scale[place].float()


def written(
    transcoder: CrossLayerTranscoder,
    source: int,
    target: int,
    features: Int64[Tensor, " kept"],
    values: Float[Tensor, " kept"],
) -> Float[Tensor, "kept d_model"]:
    """What features of these activations write to one MLP output, in the host's units."""
    amounts = amounts_of(transcoder, source, target, features, values)
    rows = transcoder.decoders.rows(source, target, features).float()
    return rows * amounts[:, None] / transcoder.target_scale[target]


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
