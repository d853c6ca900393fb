"""An attribution graph: nodes, and for each target its direct effects from everything before it.

On disk it is `graph.json` and `graph.safetensors`, described in docs/attribution.md. Node numbers: features (by layer,
position, feature), errors (layer-major), embeddings, targets (logits), and last the bias, so that all but the last
number are circuit-tracer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float32, Int32, Int64
from PIL import Image
from torch import Tensor

from clt.errors import GraphError

if TYPE_CHECKING:
    from clt.attribution.prune import PrunedGraph
    from clt.attribution.scores import GraphScores


@dataclass(frozen=True)
class Patch:
    """Where on an image one embedding comes from."""

    image: int
    row: int
    column: int
    box: tuple[float, float, float, float]
    """left, top, right, bottom in pixels of the prompt's image."""
    crop: str = "whole"
    """Which tile, where a host cuts an image into several."""


@dataclass(frozen=True)
class Position:
    """One place of the prompt."""

    token_id: int
    text: str
    kind: str
    """`text`, `image` or `special`."""
    patch: Patch | None = None
    group: int | None = None
    """Of patches grouped by likeness: the position whose embedding and error nodes have the effects of all."""


@dataclass(frozen=True)
class TargetNode:
    """What a graph explains: a logit minus the mean logit, or any other direction."""

    text: str
    token_id: int
    """At least the vocabulary's size where the target is no token."""
    probability: float
    """Its weight in every influence; for logits the softmax probability."""
    position: int


@dataclass(frozen=True)
class Edges:
    """Direct effects, row by row: edge i of row r, `row_start[r] <= i < row_start[r + 1]`, comes from `source[i]`."""

    row_start: Int64[Tensor, " row_and_end"]
    source: Int32[Tensor, " edge"]
    weight: Float32[Tensor, " edge"]

    @property
    def n_rows(self) -> int:
        """Targets of edges: features, then targets of the graph."""
        return len(self.row_start) - 1

    @cached_property
    def row(self) -> Int64[Tensor, " edge"]:
        """The row of every edge."""
        return torch.repeat_interleave(torch.arange(self.n_rows), self.row_start.diff())

    def sums(self, values: Float[Tensor, " edge"]) -> Float[Tensor, " row"]:
        """Values added up per row."""
        return values.new_zeros(self.n_rows).index_add_(0, self.row, values)


@dataclass(frozen=True, kw_only=True)
class AttributionGraph:
    """Nodes and direct effects of one prompt."""

    features: Int64[Tensor, "feature 3"]
    """Layer, position, feature of each selected feature, sorted."""
    activations: Float32[Tensor, " feature"]
    positions: Sequence[Position]
    targets: Sequence[TargetNode]
    edges: Edges
    row_value: Float32[Tensor, " row"]
    """What each row adds up to, bias included: a feature's pre-activation, a target's value."""
    active_features: Int64[Tensor, "active 3"]
    active_values: Float32[Tensor, " active"]
    n_layers: int
    prompt: str
    info: Mapping[str, Any] = field(default_factory=dict)
    """The other keys of graph.json: slug, model, transcoder, scan, n_features, vocabulary, options, checks, labels."""
    images: Sequence[Image.Image] = ()

    def __repr__(self) -> str:
        targets = ", ".join(f"{target.text!r} {target.probability:.3f}" for target in self.targets)
        return (
            f"AttributionGraph({self.prompt!r} -> {targets}: {self.n_features:,} of {len(self.active_features):,} "
            f"features, {self.n_layers} layers x {self.n_positions} positions, {len(self.edges.weight):,} edges)"
        )

    # --- numbers of nodes -------------------------------------------------------------------------------------

    @property
    def n_features(self) -> int:
        """Selected features."""
        return len(self.features)

    @property
    def n_positions(self) -> int:
        """Tokens and patches of the prompt."""
        return len(self.positions)

    @property
    def first_error(self) -> int:
        """Number of the first error node."""
        return self.n_features

    @property
    def first_embedding(self) -> int:
        """Number of the first embedding node."""
        return self.first_error + self.n_layers * self.n_positions

    @property
    def first_target(self) -> int:
        """Number of the first target node."""
        return self.first_embedding + self.n_positions

    @property
    def bias(self) -> int:
        """Number of the bias node, the last one."""
        return self.first_target + len(self.targets)

    @property
    def n_nodes(self) -> int:
        """All nodes, the bias included."""
        return self.bias + 1

    @cached_property
    def row_nodes(self) -> Int64[Tensor, " row"]:
        """The node of each row: features, then targets."""
        return torch.cat([torch.arange(self.n_features), torch.arange(self.first_target, self.bias)])

    @cached_property
    def row_layers(self) -> Int64[Tensor, " row"]:
        """Layer each row is read at; `n_layers` for targets. Edges go from lower layers to higher ones."""
        return torch.cat([self.features[:, 0], torch.full((len(self.targets),), self.n_layers)])

    @cached_property
    def target_weights(self) -> Float32[Tensor, " target"]:
        """Weight of each target in every influence."""
        return torch.tensor([target.probability for target in self.targets], dtype=torch.float32)

    # --- views ------------------------------------------------------------------------------------------------

    def to_dense(self) -> Float32[Tensor, "node node"]:
        """Adjacency `[target, source]` in circuit-tracer's node order, without the bias node.

        Raises:
            GraphError: the matrix would hold more than 4 GB; use `edges`.
        """
        n = self.bias
        if n * n * 4 > 4e9:
            raise GraphError(
                f"The dense matrix of {n:,} nodes takes {n * n * 4 / 1e9:.1f} GB, mostly zeros. Use graph.edges, or "
                "make the graph smaller with max_feature_nodes."
            )
        dense = torch.zeros(n, n)
        kept = self.edges.source < n
        dense[self.row_nodes[self.edges.row[kept]], self.edges.source[kept].long()] = self.edges.weight[kept]
        return dense

    @cached_property
    def row_sum_errors(self) -> Float32[Tensor, " row"]:
        """How far each row is from adding up, relative to the sum of its absolute values."""
        weight = self.edges.weight.double()
        total, size = self.edges.sums(weight), self.edges.sums(weight.abs())
        missing = (total - self.row_value).abs()
        return (missing / size.clamp_min(1e-30)).float()

    @cached_property
    def influence(self) -> Float32[Tensor, " node"]:
        """Influence of each node on the targets (see prune.py)."""
        from clt.attribution.prune import node_influence

        return node_influence(self)

    @cached_property
    def cumulative(self) -> Float32[Tensor, " node"]:
        """Share of all influence held by this node and all stronger ones."""
        from clt.attribution.prune import cumulative_scores

        return cumulative_scores(self.influence)

    def prune(self, *, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PrunedGraph:
        """The nodes and edges that carry these shares of the influence."""
        from clt.attribution.prune import prune

        return prune(self, node_threshold, edge_threshold)

    @cached_property
    def scores(self) -> GraphScores:
        """How much of the graph is explained: completeness and replacement scores."""
        from clt.attribution.scores import graph_scores

        return graph_scores(self)

    def save(self, folder: str | Path) -> None:
        """Write graph.json, graph.safetensors and the images."""
        from clt.attribution.files import save_graph

        save_graph(self, Path(folder))

    @staticmethod
    def load(folder: str | Path) -> AttributionGraph:
        """Read what `save` wrote.

        Raises:
            GraphError: a file is missing, damaged, or does not fit the other.
        """
        from clt.attribution.files import load_graph

        return load_graph(Path(folder))
