"""`clt attribute` writes what it says it writes, and says what is missing."""

import json

import pytest

from clt.attribution import AttributionGraph, read_circuit_tracer_json, read_circuit_tracer_pt
from clt.errors import ConfigError
from clt.scripts import attribute
from tests.attribution_hosts import random_transcoder
from tests.tiny_hosts import tiny_adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A host and a transcoder on disk."""
    root, adapter = tmp_path_factory.mktemp("attribute"), tiny_adapter("llama")
    adapter.model.save_pretrained(root / "host")
    adapter.tokenizer.save_pretrained(root / "host")
    random_transcoder(adapter).save_pretrained(root / "clt")
    return root


def options(root, **more):
    paths = {"model": str(root / "host"), "transcoder": str(root / "clt"), "out": root / "graph"}
    return attribute.Options(**{**paths, "prompt": "hello", "device": "cpu", **more})


def test_the_command_writes_the_graph_and_its_exports(folders, capsys):
    exports = {"neuronpedia": folders / "np", "pt": folders / "g.pt"}
    attribute.main(options(folders, json=True, max_feature_nodes=20, slug="hello", **exports))
    said = json.loads(capsys.readouterr().out)
    graph = AttributionGraph.load(said["graph"])
    assert said["checks"]["n_selected"] == graph.n_features == 20
    assert said["checks"]["row_sum_error"] < 1e-5
    assert [position.text for position in graph.positions] == ["<s>", *"hello"]
    assert graph.info["scan"] == str(folders / "clt")
    assert len(read_circuit_tracer_json(folders / "np" / "hello.json").edges.weight) <= said["kept_edges"]
    assert read_circuit_tracer_pt(folders / "g.pt").n_features == 20


def test_two_tokens_are_compared(folders, capsys):
    attribute.main(options(folders, json=True, target=("a",), minus="b"))
    assert [target["text"] for target in json.loads(capsys.readouterr().out)["targets"]] == ["a - b"]


def test_a_plan_is_printed_and_nothing_computed(folders, capsys):
    attribute.main(options(folders, plan=True, out=folders / "planned"))
    said = capsys.readouterr().out
    assert "6 positions" in said
    assert all(word in said for word in ("patterns", "backward", "memory", "disk"))
    assert not (folders / "planned").exists()
    attribute.main(options(folders, plan=True, json=True))
    assert json.loads(capsys.readouterr().out)["n_positions"] == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": None}, "needs --model, --transcoder and --prompt"),
        ({"minus": "a"}, "exactly one --target"),
        ({"max_feature_nodes": 0}, "max_feature_nodes"),
        ({"desired_logit_prob": 1.5}, "desired_logit_prob"),
    ],
)
def test_what_cannot_work_is_refused_in_words(folders, given, message):
    with pytest.raises(ConfigError, match=message):
        options(folders, **given)
