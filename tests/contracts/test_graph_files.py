"""Graph files of circuit-tracer and Neuronpedia, read by loaders written here from the format's description."""

import gzip
import json
import pickle
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from clt.attribution import (
    attribute,
    read_circuit_tracer_json,
    read_circuit_tracer_pt,
    write_circuit_tracer_json,
    write_circuit_tracer_pt,
)
from clt.attribution.feature_examples import Example, FeatureCard, read_feature_example, write_feature_examples
from clt.errors import GraphError
from clt.replacement import ReplacementModel
from clt.types import FeatureId
from tests.attribution_hosts import random_replacement

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden_graph"
NODE_KEYS = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}


@pytest.fixture(scope="module")
def graph():
    model, inputs = random_replacement("llama")
    return attribute(model, inputs, max_feature_nodes=30, slug="tiny", scan="/some/folder")


def test_json_has_what_the_schema_asks_for_and_ids_do_not_collide(graph, tmp_path):
    pruned = graph.prune()
    path = write_circuit_tracer_json(pruned, tmp_path)
    described = json.loads(path.read_text())
    assert {"metadata", "qParams", "nodes", "links"} <= described.keys()
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= described["metadata"].keys()
    assert all(node.keys() >= NODE_KEYS for node in described["nodes"])
    ids = [node["node_id"] for node in described["nodes"]]
    assert len(ids) == len(set(ids))
    assert all(len(list(map(int, each.split("_")))) == 3 for each in ids if not each.startswith("E"))
    assert all({link["source"], link["target"]} <= set(ids) for link in described["links"])
    logits = [node for node in described["nodes"] if node["feature_type"] == "logit"]
    assert len(logits) == len(graph.targets)
    assert all("(p=" in node["clerp"] and node["clerp"].count('"') >= 2 for node in logits)
    assert [node["is_target_logit"] for node in logits] == [True] + [False] * (len(logits) - 1)
    write_circuit_tracer_json(pruned, tmp_path, slug="second")
    write_circuit_tracer_json(pruned, tmp_path, slug="second")
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [each["slug"] for each in listed] == ["tiny", "second"]


def test_json_comes_back_with_the_kept_edges(graph, tmp_path):
    pruned = graph.prune()
    back = read_circuit_tracer_json(write_circuit_tracer_json(pruned, tmp_path))
    kept = graph.features[pruned.node_mask[: graph.n_features]].tolist()
    assert back.features.tolist() == [place for place in kept if place in back.features.tolist()]
    assert sorted(back.edges.weight.tolist()) == sorted(graph.edges.weight[pruned.kept_edges].tolist())
    assert [target.token_id for target in back.targets] == [target.token_id for target in graph.targets]
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(GraphError, match="metadata"):
        read_circuit_tracer_json(tmp_path / "broken.json")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden graph at {GOLDEN}")
def test_json_is_circuit_tracers_but_for_the_ids_of_errors(tmp_path):
    theirs = json.loads((GOLDEN / "out-transformerlens" / "json" / "tiny.json").read_text())
    model = ReplacementModel.from_pretrained(GOLDEN / "model", GOLDEN / "clt", device="cpu")
    whole = attribute(model, (GOLDEN / "prompt.txt").read_text(), max_feature_nodes=None)
    ours = json.loads(write_circuit_tracer_json(whole.prune(), tmp_path, slug="tiny", scan="gpt2/clt").read_text())
    names = {
        f"{node['layer']}_-1_{node['ctx_idx']}": node["node_id"]
        for node in theirs["nodes"]
        if node["feature_type"].endswith("error")
    }
    for key in ("slug", "scan", "prompt_tokens", "prompt", "transcoder_list", "node_threshold", "schema_version"):
        assert ours["metadata"][key] == theirs["metadata"][key]
    by_id = {(node["node_id"], node["feature_type"]): node for node in theirs["nodes"]}
    assert len(by_id) == len(ours["nodes"])
    for node in ours["nodes"]:
        node["node_id"] = names.get(node["node_id"], node["node_id"])
        other = by_id[node["node_id"], node["feature_type"]]
        for key in NODE_KEYS | {"is_target_logit", "token_prob"}:
            assert node[key] == pytest.approx(other[key], rel=1e-5) if key == "token_prob" else node[key] == other[key]
        assert node["influence"] == (
            None if other["influence"] is None else pytest.approx(other["influence"], abs=1e-5)
        )
    weights = sorted(link["weight"] for link in ours["links"])
    assert weights == pytest.approx(sorted(link["weight"] for link in theirs["links"]), abs=1e-5)


class LogitTarget(NamedTuple):
    """circuit-tracer's, for when it is not installed; the public one is tested in tests/interop."""

    token_str: str
    vocab_idx: int


class UnifiedConfig(SimpleNamespace):
    """circuit-tracer's dataclass."""


@pytest.fixture
def their_classes(monkeypatch):
    """The names that circuit-tracer's files hold."""
    monkeypatch.setitem(sys.modules, "circuit_tracer", SimpleNamespace())
    for name, found in (("attribution.targets", LogitTarget), ("utils.tl_nnsight_mapping", UnifiedConfig)):
        module = SimpleNamespace(**{found.__name__: found})
        monkeypatch.setitem(sys.modules, f"circuit_tracer.{name}", module)


@pytest.mark.usefixtures("their_classes")
def test_pt_holds_what_circuit_tracers_loader_reads(graph, tmp_path):
    path = write_circuit_tracer_pt(graph, tmp_path / "graph.pt", tokenizer="/some/tokenizer")
    # As circuit-tracer's Graph.from_pt does: a dict, its classes unpickled.
    values = torch.load(path, weights_only=False)
    n = graph.n_features + graph.n_layers * graph.n_positions + graph.n_positions + len(graph.targets)
    assert values["adjacency_matrix"].shape == (n, n)
    assert torch.equal(values["adjacency_matrix"], graph.to_dense())
    assert torch.equal(values["active_features"][values["selected_features"]], graph.features)
    assert values["logit_targets"] == [(target.text, target.token_id) for target in graph.targets]
    assert all(isinstance(target, LogitTarget) for target in values["logit_targets"])
    assert isinstance(values["cfg"], UnifiedConfig)
    assert values["cfg"].n_layers == graph.n_layers
    assert values["cfg"].tokenizer_name == "/some/tokenizer"
    assert values["input_tokens"].tolist() == [position.token_id for position in graph.positions]
    back = read_circuit_tracer_pt(path)
    assert torch.equal(back.to_dense(), graph.to_dense())
    assert torch.equal(back.prune().edge_mask, graph.prune().edge_mask)
    assert [target.text for target in back.targets] == [target.text for target in graph.targets]


class Malicious:
    """Runs when an ordinary unpickler meets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_reading_a_pt_runs_nothing_in_it(tmp_path):
    torch.save({"adjacency_matrix": Malicious(tmp_path / "touched")}, tmp_path / "bad.pt")
    with pytest.raises(GraphError, match="holds calls"):
        read_circuit_tracer_pt(tmp_path / "bad.pt")
    assert not (tmp_path / "touched").exists()
    (tmp_path / "worse.pt").write_bytes(pickle.dumps([1]))
    with pytest.raises(GraphError, match="no graph of circuit-tracer"):
        read_circuit_tracer_pt(tmp_path / "worse.pt")


@pytest.mark.parametrize("place", [(0, 0), (3, 0), (0, 7), (11, 24_575), (31, 1_000_000)])
def test_cantor_numbers_come_back(place):
    assert FeatureId.from_number(FeatureId(*place).number) == place
    assert FeatureId(0, 7).number == 35


def test_feature_examples_are_read_by_byte_range(tmp_path):
    card = FeatureCard({"Top activations": [Example(["a", "b"], [0.5, 2.0])]}, top_logits=["x"], frequency=0.1)
    folder = write_feature_examples(
        {(1, 2): card, (1, 0): card}, tmp_path / "features", n_layers=2, n_features=4, scan="/s"
    )
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    start, end = index[1]["offsets"][2:4]
    # The page asks for one byte too many.
    packed = (folder / index[1]["filename"]).read_bytes()[start : end + 1]
    (length,) = struct.unpack("<I", packed[:4])
    record = json.loads(zlib.decompress(packed[4 : 4 + length]))
    assert record == read_feature_example(folder, 1, 2)
    assert record["index"] == FeatureId(1, 2).number
    example = record["examples_quantiles"][0]["examples"][0]
    assert (example["train_token_ind"], record["act_max"]) == (1, 2.0)
    assert read_feature_example(folder, 1, 3) is None
    with pytest.raises(GraphError, match="feature 9"):
        read_feature_example(folder, 0, 9)
