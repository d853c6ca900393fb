"""How much of a graph is explained by features and tokens, and how much is left to errors.

With influence I and normalised absolute effects N as in prune.py, w the targets' weights:

    replacement         I(embeddings) / (I(embeddings) + I(errors))
    completeness        mean over nodes, weighted by I + w, of the share of a node's input that comes from no error
    replacement_strict, completeness_strict
                        the same where the bias node counts as unexplained input, and only nodes that have inputs count

circuit-tracer's completeness is the first: there error and embedding nodes, which have no inputs, count as fully
explained, and biases do not count at all. Source: circuit-tracer 0.4.1, `compute_graph_scores`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from clt.attribution.graph import AttributionGraph, Edges
from clt.attribution.prune import normalised, propagate, start


@dataclass(frozen=True)
class GraphScores:
    """See the module's description; all between 0 and 1, more is better."""

    replacement: float
    completeness: float
    replacement_strict: float
    completeness_strict: float

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def graph_scores(graph: AttributionGraph) -> GraphScores:
    """Completeness and replacement score, in circuit-tracer's definition and the stricter one."""
    no_bias = normalised(graph, graph.edges.source < graph.bias)
    with_bias = normalised(graph, torch.ones_like(graph.edges.source, dtype=torch.bool))
    loose, strict = propagate(graph, no_bias), propagate(graph, with_bias)
    is_error = _is_error(graph)
    is_bias = torch.arange(graph.n_nodes) == graph.bias
    return GraphScores(
        replacement=_replacement(graph, loose, is_error),
        completeness=_completeness(graph, no_bias, loose, is_error, only_rows=False),
        replacement_strict=_replacement(graph, strict, is_error | is_bias),
        completeness_strict=_completeness(graph, with_bias, strict, is_error | is_bias, only_rows=True),
    )


def subgraph_scores(graph: AttributionGraph, features: Bool[Tensor, " feature"]) -> GraphScores:
    """The scores of a graph of only these features: all others count as error of their layer and position."""
    return graph_scores(keep_features(graph, features))


def keep_features(graph: AttributionGraph, features: Bool[Tensor, " feature"]) -> AttributionGraph:
    """A graph with fewer features, whose rows still add up: what the others gave, their errors give."""
    layer, position = graph.features[:, 0], graph.features[:, 1]
    n_kept = int(features.sum())
    moved = torch.empty(graph.n_nodes, dtype=torch.int64)
    moved[: graph.n_features] = torch.where(
        features, features.cumsum(0) - 1, n_kept + layer * graph.n_positions + position
    )
    moved[graph.n_features :] = torch.arange(n_kept, n_kept + graph.n_nodes - graph.n_features)
    rows = torch.cat([features, torch.ones(len(graph.targets), dtype=torch.bool)])
    n_nodes = n_kept + graph.n_nodes - graph.n_features
    return AttributionGraph(
        features=graph.features[features],
        activations=graph.activations[features],
        positions=graph.positions,
        targets=graph.targets,
        edges=select_rows(graph.edges, rows, moved, n_nodes),
        row_value=graph.row_value[rows],
        active_features=graph.active_features,
        active_values=graph.active_values,
        n_layers=graph.n_layers,
        prompt=graph.prompt,
        info=graph.info,
        images=graph.images,
    )


def select_rows(edges: Edges, rows: Bool[Tensor, " row"], moved: Tensor, n_nodes: int) -> Edges:
    """Some rows, their sources renumbered by `moved` (-1: dropped), edges that then coincide added up."""
    chosen = rows[edges.row]
    row = (rows.cumsum(0) - 1)[edges.row[chosen]]
    source = moved[edges.source[chosen].long()]
    weight = edges.weight[chosen][source >= 0]
    key = (row * n_nodes + source)[source >= 0]
    keys, place = key.unique(return_inverse=True)
    summed = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, place, weight.double())
    counts = torch.bincount(keys // n_nodes, minlength=int(rows.sum()))
    row_start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Edges(row_start, (keys % n_nodes).int(), summed.float())


def _is_error(graph: AttributionGraph) -> Bool[Tensor, " node"]:
    place = torch.arange(graph.n_nodes)
    return (place >= graph.first_error) & (place < graph.first_embedding)


def _replacement(graph: AttributionGraph, influence: Float64[Tensor, " node"], unexplained: Tensor) -> float:
    explained = float(influence[graph.first_embedding : graph.first_target].sum())
    total = explained + float(influence[unexplained].sum())
    return explained / total if total else 1.0


def _completeness(
    graph: AttributionGraph,
    shares: Float64[Tensor, " edge"],
    influence: Float64[Tensor, " node"],
    unexplained: Tensor,
    *,
    only_rows: bool,
) -> float:
    weight = influence + start(graph)
    missing = graph.edges.sums(shares * unexplained[graph.edges.source.long()])
    lost = float((missing * weight[graph.row_nodes]).sum())
    total = float(weight[graph.row_nodes].sum() if only_rows else weight.sum())
    return 1 - lost / total if total else 1.0
