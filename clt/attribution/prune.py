"""Influence, and the part of a graph that carries most of it.

With w the targets' weights and N the matrix of absolute direct effects, each row divided by its sum, the influence of
all nodes is w N + w N² + ...: what share of the targets' input passes through a node. Edges go from lower layers to
higher ones, so one walk over the rows from the top gives the whole sum. The bias node takes no part (circuit-tracer
has none, and the masks are to be the same).

Source: Ameisen et al. 2025, "Circuit Tracing", appendix on graph pruning; circuit-tracer 0.4.1 for the order of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from clt.attribution.graph import AttributionGraph
from clt.errors import ConfigError, GraphError

# Rows that have no effect on anything keep zero shares.
_LEAST_SUM = 1e-10


@dataclass(frozen=True)
class PrunedGraph:
    """Which nodes and edges of a graph are kept; masks are in circuit-tracer's node order, without the bias."""

    graph: AttributionGraph
    node_mask: Bool[Tensor, " node"]
    kept_edges: Bool[Tensor, " edge"]
    """One entry per edge of `graph.edges`."""

    def __repr__(self) -> str:
        nodes, edges = int(self.node_mask.sum()), int(self.kept_edges.sum())
        kept = f"{nodes:,} of {len(self.node_mask):,} nodes, {edges:,} of {len(self.kept_edges):,} edges"
        return f"PrunedGraph({kept} of {self.graph!r})"

    @property
    def edge_mask(self) -> Bool[Tensor, "node node"]:
        """`[target, source]`, dense; of a large graph use `kept_edges`."""
        n = len(self.node_mask)
        if n * n > 4e9:
            raise GraphError(f"A mask of {n:,} x {n:,} takes {n * n / 1e9:.1f} GB. Use kept_edges instead.")
        mask = torch.zeros(n, n, dtype=torch.bool)
        edges, kept = self.graph.edges, self.kept_edges
        mask[self.graph.row_nodes[edges.row[kept]], edges.source[kept].long()] = True
        return mask

    @property
    def cumulative(self) -> Float32[Tensor, " node"]:
        """Share of all influence held by each node and all stronger ones, in the unpruned graph."""
        return self.graph.cumulative[: len(self.node_mask)]

    cumulative_scores = cumulative


def prune(graph: AttributionGraph, node_threshold: float, edge_threshold: float) -> PrunedGraph:
    """Keep the strongest nodes, then the strongest edges between them, then what is still connected.

    Args:
        node_threshold: share of the influence that kept nodes hold; embeddings and targets are always kept.
        edge_threshold: share of the edges' scores that kept edges hold.

    Raises:
        ConfigError: a threshold is not between 0 and 1.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} = {value} is a share of the influence: choose it between 0 and 1.")
    influence = graph.influence[: graph.bias]
    nodes = influence >= share_threshold(influence, node_threshold)
    nodes[graph.first_embedding :] = True
    scores = edge_scores(graph, nodes)
    edges = (scores > 0) & (scores >= share_threshold(scores, edge_threshold))
    return PrunedGraph(graph, *_connected(graph, nodes, edges))


def node_influence(graph: AttributionGraph) -> Float32[Tensor, " node"]:
    """Share of the targets' input that passes through each node; targets themselves and the bias have 0."""
    shares = normalised(graph, graph.edges.source < graph.bias)
    return propagate(graph, shares).float()


def edge_scores(graph: AttributionGraph, nodes: Bool[Tensor, " node"]) -> Float32[Tensor, " edge"]:
    """Each edge's share of its target's input, times the target's influence, among the kept nodes only."""
    edges = graph.edges
    kept = nodes[graph.row_nodes][edges.row] & torch.cat([nodes, nodes.new_zeros(1)])[edges.source.long()]
    shares = normalised(graph, kept)
    through = propagate(graph, shares) + start(graph)
    return (shares * through[graph.row_nodes][edges.row]).float()


def normalised(graph: AttributionGraph, kept: Bool[Tensor, " edge"]) -> Float64[Tensor, " edge"]:
    """Absolute weights of the kept edges, each row divided by its sum; 0 for the others."""
    size = graph.edges.weight.double().abs() * kept
    return size / graph.edges.sums(size).clamp_min(_LEAST_SUM)[graph.edges.row]


def start(graph: AttributionGraph) -> Float64[Tensor, " node"]:
    """The targets' weights at the targets, 0 elsewhere."""
    weights = torch.zeros(graph.n_nodes, dtype=torch.float64)
    weights[graph.first_target : graph.bias] = graph.target_weights.double()
    return weights


def propagate(graph: AttributionGraph, shares: Float64[Tensor, " edge"]) -> Float64[Tensor, " node"]:
    """w N + w N² + ..., from the top layer down; rows of one layer have no edges among themselves."""
    edges, layers = graph.edges, graph.row_layers
    first, influence = start(graph), torch.zeros(graph.n_nodes, dtype=torch.float64)
    ends = torch.searchsorted(layers, torch.arange(graph.n_layers + 2))
    for layer in range(graph.n_layers, -1, -1):
        rows = slice(int(ends[layer]), int(ends[layer + 1]))
        part = slice(int(edges.row_start[rows.start]), int(edges.row_start[rows.stop]))
        through = (influence + first)[graph.row_nodes[rows]]
        passed = shares[part] * through[edges.row[part] - rows.start]
        influence.index_add_(0, edges.source[part], passed)
    return influence


def cumulative_scores(influence: Float32[Tensor, " node"]) -> Float32[Tensor, " node"]:
    """Share of the total held by each node and all that have more."""
    order = influence.argsort(descending=True, stable=True)
    shares = influence[order].double().cumsum(0) / influence.double().sum().clamp_min(_LEAST_SUM)
    return torch.zeros_like(influence).scatter(0, order, shares.float())


def share_threshold(scores: Float[Tensor, " any"], share: float) -> float:
    """The largest value such that all scores of at least it hold `share` of the total; found without sorting.

    Non-negative floats are ordered like their bits, so three histograms of bits, each weighted by the scores, find
    the value exactly: time and memory grow with the number of scores, not with its logarithm.
    """
    values = scores.float()
    bits = values.view(torch.int32)
    wanted, above = share * float(values.double().sum()), 0.0
    found = 0
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        digit = (bits >> shift) & ((1 << width) - 1)
        mass = torch.bincount(digit, weights=values.double(), minlength=1 << width)
        present = torch.bincount(digit, minlength=1 << width) > 0
        reached = above + mass.flip(0).cumsum(0).flip(0)
        candidates = ((reached >= wanted) & present).nonzero()
        # Rounding may leave the total short of itself: then the smallest value there is.
        place = int(candidates[-1]) if len(candidates) else int(present.nonzero()[0])
        above = float(reached[place] - mass[place])
        found |= place << shift
        chosen = digit == place
        bits, values = bits[chosen], values[chosen]
    return float(torch.tensor(found, dtype=torch.int32).view(torch.float32))


def _connected(
    graph: AttributionGraph, nodes: Bool[Tensor, " node"], edges: Bool[Tensor, " edge"]
) -> tuple[Bool[Tensor, " node"], Bool[Tensor, " edge"]]:
    """Drop features and errors without an outgoing edge and features without an incoming one, until none is left."""
    nodes, edges = nodes.clone(), edges.clone()
    inner = graph.first_embedding
    row, source = graph.row_nodes[graph.edges.row], graph.edges.source.long()
    while True:
        gives, takes = torch.zeros_like(nodes), torch.zeros_like(nodes)
        gives[source[edges]] = True
        takes[row[edges]] = True
        before = nodes.clone()
        nodes[:inner] &= gives[:inner]
        nodes[: graph.n_features] &= takes[: graph.n_features]
        if torch.equal(nodes, before):
            return nodes, edges
        # The bias is a source of edges, but no kept ones.
        edges &= nodes[row] & torch.cat([nodes, nodes.new_zeros(1)])[source]
