"""circuit-tracer itself opens what `clt export --format circuit-tracer` writes, and makes the graph that we make."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interop.cases import CIRCUIT_TRACER, PROMPT
from tests.interop.conftest import ours

pytestmark = pytest.mark.interop
pytest.importorskip("circuit_tracer")

from circuit_tracer import Graph, ReplacementModel, attribute  # noqa: E402
from circuit_tracer.graph import compute_graph_scores, prune_graph  # noqa: E402
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder  # noqa: E402
from circuit_tracer.utils.create_graph_files import create_graph_files  # noqa: E402
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub  # noqa: E402


def close(found, expected, tolerance=1e-5):
    """Equal to float32's precision, seen from the largest value."""
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", CIRCUIT_TRACER)
def test_circuit_tracer_computes_what_we_do(made, name, lazy):
    loaded, config = load_transcoder_from_hub(str(made / name / "theirs"), lazy_encoder=lazy, lazy_decoder=lazy)
    computed = load_file(made / name / "computed.safetensors")
    x = computed["inputs"]
    assert config["feature_input_hook"] == CIRCUIT_TRACER[name].hooks[0]
    with torch.no_grad():
        activations = loaded.encode(x)
        close(activations, computed["activations"])
        close(loaded.decode(activations, x), computed["outputs"])


@pytest.fixture(scope="module")
def their_graph(made):
    """circuit-tracer's own graph of a case, made once."""
    graphs = {}

    def graph(name):
        if name not in graphs:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(made)  # TransformerLens takes a folder that is called as a model it knows
                case = CIRCUIT_TRACER[name]
                model_name = case.host if case.backend == "transformerlens" else str(made / case.host)
                model = ReplacementModel.from_pretrained(
                    model_name, str(made / name / "theirs"), backend=case.backend, device=torch.device("cpu")
                )
                graphs[name] = attribute(torch.tensor(PROMPT), model, batch_size=32)
        return graphs[name]

    return graph


@pytest.mark.parametrize("name", CIRCUIT_TRACER)
def test_circuit_tracers_graph_is_ours(made, name, their_graph):
    theirs, mine = their_graph(name), load_file(made / name / "graph.safetensors")
    assert torch.equal(theirs.active_features, mine["active"])
    close(theirs.activation_values, mine["values"])
    assert torch.equal(theirs.active_features[theirs.selected_features], mine["features"])
    assert theirs.logit_token_ids.tolist() == mine["targets"].tolist()
    torch.testing.assert_close(theirs.logit_probabilities, mine["probabilities"])
    close(theirs.adjacency_matrix, mine["adjacency"])
    assert mine["adjacency"].count_nonzero() > 100
    nodes, edges, cumulative = prune_graph(theirs)
    assert torch.equal(nodes, mine["node_mask"])
    assert torch.equal(edges, mine["edge_mask"])
    torch.testing.assert_close(cumulative, mine["cumulative"], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(compute_graph_scores(theirs)), mine["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["jumprelu", "nnsight"])
def test_circuit_tracer_loads_our_graph_file(made, name, tmp_path):
    loaded, mine = Graph.from_pt(str(made / name / "graph.pt")), load_file(made / name / "graph.safetensors")
    assert torch.equal(loaded.adjacency_matrix, mine["adjacency"])
    assert loaded.logit_token_ids.tolist() == mine["targets"].tolist()
    nodes, edges, _ = prune_graph(loaded)
    assert torch.equal(nodes, mine["node_mask"])
    assert torch.equal(edges, mine["edge_mask"])
    create_graph_files(loaded, "tiny", str(tmp_path))
    described = json.loads((tmp_path / "tiny.json").read_text())
    assert described["metadata"]["scan"] == str(made / name / "theirs")
    assert len(described["links"]) == int(mine["edge_mask"].sum())


@pytest.mark.parametrize("name", ["jumprelu", "skips"])
def test_we_read_circuit_tracers_graph_files(made, their_graph, name, tmp_path, monkeypatch):
    monkeypatch.chdir(made)  # for the tokenizer of "gpt2"
    theirs = their_graph(name)
    theirs.to_pt(str(tmp_path / "graph.pt"))
    ours("graph", tmp_path / "graph.pt", tmp_path / "whole.safetensors")
    whole = load_file(tmp_path / "whole.safetensors")
    assert torch.equal(whole["adjacency"], theirs.adjacency_matrix)
    assert torch.equal(whole["features"], theirs.active_features[theirs.selected_features])
    create_graph_files(theirs, "tiny", str(tmp_path))
    ours("graph", tmp_path / "tiny.json", tmp_path / "kept.safetensors")
    links = json.loads((tmp_path / "tiny.json").read_text())["links"]
    weights = torch.tensor([link["weight"] for link in links]).sort().values
    torch.testing.assert_close(load_file(tmp_path / "kept.safetensors")["weights"], weights)


@pytest.mark.parametrize("activation", ["relu", "jump_relu"])
def test_we_compute_what_circuit_tracer_does(activation, tmp_path):
    layers, width, features = 3, 8, 12
    theirs = CrossLayerTranscoder(
        layers, features, width, activation_function=activation, lazy_decoder=False, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.abs() if "threshold" in name else values)
    (tmp_path / "theirs").mkdir()
    theirs.to_safetensors(str(tmp_path / "theirs"))
    x = torch.randn(layers, 50, width, generator=generator)
    save_file({"inputs": x}, tmp_path / "inputs.safetensors")
    ours("run", tmp_path / "theirs", tmp_path / "inputs.safetensors", tmp_path / "found.safetensors")
    found = load_file(tmp_path / "found.safetensors")
    with torch.no_grad():
        activations = theirs.encode(x)
        for prefix in ("", "imported_"):
            close(found[f"{prefix}activations"], activations)
            close(found[f"{prefix}outputs"], theirs.decode(activations, x))
