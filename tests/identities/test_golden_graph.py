"""The golden graph: a tiny GPT-2 and a random JumpReLU CLT, attributed and pruned by circuit-tracer itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clt.attribution import attribute
from clt.replacement import ReplacementModel

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden_graph"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden graph at {GOLDEN}")

VARIANTS = {
    "out-transformerlens": {"max_feature_nodes": None},
    "out-transformerlens-max100": {"max_feature_nodes": 100, "batch_size": 16, "unselected": "drop"},
}


@pytest.fixture(scope="module")
def model():
    return ReplacementModel.from_pretrained(GOLDEN / "model", GOLDEN / "clt", device="cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_nodes_effects_masks_and_scores_are_circuit_tracers(model, variant):
    theirs = load_file(GOLDEN / variant / "ref.safetensors")
    graph = attribute(model, (GOLDEN / "prompt.txt").read_text(encoding="utf-8"), **VARIANTS[variant])
    pruned = graph.prune(node_threshold=0.8, edge_threshold=0.98)

    assert [position.token_id for position in graph.positions] == theirs["input_tokens"].tolist()
    assert torch.equal(graph.active_features, theirs["active_features"])
    torch.testing.assert_close(graph.active_values, theirs["activation_values"])
    assert torch.equal(graph.features, theirs["active_features"][theirs["selected_features"]])
    assert [target.token_id for target in graph.targets] == theirs["logit_ids"].tolist()
    torch.testing.assert_close(graph.target_weights, theirs["logit_p"])
    assert (graph.to_dense() - theirs["adjacency"]).abs().max() < 1e-5
    assert torch.equal(pruned.node_mask, theirs["node_mask"])
    assert torch.equal(pruned.edge_mask, theirs["edge_mask"])
    torch.testing.assert_close(pruned.cumulative, theirs["cumulative"], rtol=0, atol=1e-6)


def test_the_whole_graph_scores_as_measured_with_circuit_tracer(model):
    graph = attribute(model, (GOLDEN / "prompt.txt").read_text(encoding="utf-8"), max_feature_nodes=None)
    # reference/attribution.md: 0.910 by circuit-tracer's definition, where nodes without inputs count as explained.
    assert graph.scores.completeness == pytest.approx(0.910, abs=5e-4)
    assert graph.scores.completeness_strict < graph.scores.completeness
    assert graph.scores.replacement_strict < graph.scores.replacement
    assert graph.row_sum_errors.max() < 1e-5
