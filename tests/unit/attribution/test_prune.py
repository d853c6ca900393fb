"""Influence, thresholds and pruning against the formulas written out on dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.attribution import AttributionGraph, subgraph_scores
from clt.attribution.graph import Edges, Position, TargetNode
from clt.attribution.prune import share_threshold
from clt.errors import ConfigError

LAYERS, POSITIONS = 3, 2
seeds = st.integers(0, 10_000)


def random_graph(seed: int, n_features: int = 8, n_targets: int = 2) -> AttributionGraph:
    """Rows with random entries wherever a lower layer is."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.stack(
        [
            torch.randint(0, LAYERS, (n_features,), generator=rng),
            torch.randint(0, POSITIONS, (n_features,), generator=rng),
            torch.arange(n_features),
        ],
        1,
    )
    features = features[(features[:, 0] * 100 + features[:, 1] * 10 + features[:, 2]).argsort()]
    layers = torch.cat(
        [features[:, 0], torch.arange(LAYERS).repeat_interleave(POSITIONS), torch.full((POSITIONS,), -1)]
    )
    counts, sources, weights = [0], [], []
    for layer in [*features[:, 0].tolist(), *[LAYERS] * n_targets]:
        below = (layers < layer).nonzero().squeeze(1)
        below = below[torch.rand(len(below), generator=rng) < 0.8]
        bias = torch.tensor([len(layers) + n_targets])
        sources.append(torch.cat([below, bias]))
        weights.append(torch.randn(len(below) + 1, generator=rng))
        counts.append(len(below) + 1)
    edges = Edges(torch.tensor(counts).cumsum(0), torch.cat(sources).int(), torch.cat(weights))
    return AttributionGraph(
        features=features,
        activations=torch.ones(n_features),
        positions=[Position(i, str(i), "text") for i in range(POSITIONS)],
        targets=[TargetNode(str(i), i, 0.5 / (i + 1), POSITIONS - 1) for i in range(n_targets)],
        edges=edges,
        row_value=edges.sums(edges.weight),
        active_features=features,
        active_values=torch.ones(n_features),
        n_layers=LAYERS,
        prompt="",
        info={"options": {"unselected": "error"}},
    )


def dense_reference(matrix, weights, n_features, n_always, node_share, edge_share):
    """Section 2 of the method, on a whole matrix with a sort."""

    def influence(matrix):
        shares = matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp_min(1e-10)
        total, passing = torch.zeros_like(weights), weights
        for _ in range(LAYERS + 3):
            passing = passing @ shares
            total = total + passing
        return shares, total

    def threshold(values, share):
        ordered = values.sort(descending=True).values
        reached = ordered.cumsum(0) / ordered.sum()
        return ordered[min(int(torch.searchsorted(reached, share)), len(values) - 1)]

    matrix = matrix.double()
    nodes = influence(matrix)[1]
    mask = nodes >= threshold(nodes, node_share)
    mask[n_always:] = True
    kept = matrix * mask * mask[:, None]
    shares, total = influence(kept)
    scores = shares * (total + weights)[:, None]
    edges = (scores >= threshold(scores.flatten(), edge_share)) & (scores > 0)
    for _ in range(len(mask)):
        mask[:n_always] &= edges[:, :n_always].any(0)
        mask[:n_features] &= edges[:n_features].any(1)
        edges = edges & mask & mask[:, None]
    return nodes, mask, edges


@given(seed=seeds, node_share=st.floats(0.3, 0.95), edge_share=st.floats(0.5, 0.99))
@settings(max_examples=40)
def test_pruning_is_the_dense_methods(seed, node_share, edge_share):
    graph = random_graph(seed)
    matrix = graph.to_dense()
    weights = torch.zeros(graph.bias, dtype=torch.float64)
    weights[graph.first_target :] = graph.target_weights.double()
    nodes, mask, edges = dense_reference(
        matrix, weights, graph.n_features, graph.first_embedding, node_share, edge_share
    )
    pruned = graph.prune(node_threshold=node_share, edge_threshold=edge_share)
    torch.testing.assert_close(graph.influence[: graph.bias].double(), nodes, rtol=1e-5, atol=1e-7)
    assert torch.equal(pruned.node_mask, mask)
    assert torch.equal(pruned.edge_mask, edges)


@given(values=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60), share=st.floats(0, 1))
def test_threshold_without_sorting_is_the_sorted_one(values, share):
    scores = torch.tensor(values)
    found = share_threshold(scores, share)
    assert (scores == found).any()
    total = scores.double().sum()
    at_least, above = scores[scores >= found].double().sum(), scores[scores > found].double().sum()
    assert at_least >= share * total * (1 - 1e-12) or found == scores.min()
    assert above <= share * total or above == 0 or at_least == above


@given(seed=seeds)
@settings(max_examples=20)
def test_what_is_left_out_of_a_subgraph_counts_as_error(seed):
    graph = random_graph(seed)
    everything = torch.ones(graph.n_features, dtype=torch.bool)
    assert subgraph_scores(graph, everything) == graph.scores
    none = subgraph_scores(graph, ~everything)
    assert none.replacement <= graph.scores.replacement + 1e-9


def test_scores_of_a_graph_worked_out_by_hand():
    """One feature of layer 0; the target hears the feature (2), the error (1) and the token (1), and a bias (4)."""
    edges = Edges(
        torch.tensor([0, 1, 5]), torch.tensor([2, 0, 1, 2, 4]).int(), torch.tensor([3.0, 2.0, -1.0, 1.0, 4.0])
    )
    graph = AttributionGraph(
        features=torch.tensor([[0, 0, 0]]),
        activations=torch.ones(1),
        positions=[Position(0, "a", "text")],
        targets=[TargetNode("b", 1, 1.0, 0)],
        edges=edges,
        row_value=torch.tensor([3.0, 6.0]),
        active_features=torch.tensor([[0, 0, 0]]),
        active_values=torch.ones(1),
        n_layers=1,
        prompt="",
    )
    assert graph.influence.tolist() == [0.5, 0.25, 0.75, 0.0, 0.0]
    assert graph.scores.replacement == pytest.approx(0.75)
    # weights I + w: feature .5, error .25, token .75, target 1; only the target's input has error, a quarter of it.
    assert graph.scores.completeness == pytest.approx(1 - 0.25 / 2.5)
    # With the bias the target's shares are 1/4, 1/8, 1/8, 1/2, and only feature and target have inputs.
    assert graph.scores.replacement_strict == pytest.approx(0.375 / (0.375 + 0.125 + 0.5))
    assert graph.scores.completeness_strict == pytest.approx(1 - 0.625 / 1.25)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        graph.prune(node_threshold=80)
