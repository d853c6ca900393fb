"""Exported graphs and feature examples against the JSON schemas that the package ships."""

import copy
import gzip
import json
from importlib.resources import files

import jsonschema
import pytest

from clt.__main__ import main
from clt.attribution import Contrast, attribute, write_circuit_tracer_json
from clt.attribution.feature_examples import Example, FeatureCard, read_feature_example, write_feature_examples
from tests.attribution_hosts import random_replacement
from tests.identities.test_golden_graph import GOLDEN


def schema(name, part=None):
    """A shipped schema, or one of its definitions as a schema of its own."""
    values = json.loads(files("clt.attribution").joinpath("schemas", f"{name}.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(values)
    return values if part is None else {"$ref": f"#/$defs/{part}", "$defs": values["$defs"]}


def check(values, name, part=None):
    jsonschema.validate(values, schema(name, part), cls=jsonschema.Draft7Validator)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A graph's JSON and the folder it lies in."""
    folder = tmp_path_factory.mktemp("graphs")
    model, inputs = random_replacement("llama")
    graph = attribute(model, inputs, max_feature_nodes=30, slug="tiny", scan="/some/folder")
    return json.loads(write_circuit_tracer_json(graph.prune(), folder).read_text()), folder


def test_an_exported_graph_and_the_list_of_graphs_are_valid(exported):
    described, folder = exported
    check(described, "graph")
    check(json.loads((folder / "graph-metadata.json").read_text()), "graph", "list")
    kinds = {node["feature_type"] for node in described["nodes"]}
    assert kinds == {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


@pytest.mark.parametrize("family", ["gpt2", "qwen2_5_vl"])
def test_so_are_those_of_other_hosts_images_and_contrasts(family, tmp_path):
    model, inputs = random_replacement(family)
    graph = attribute(model, inputs, targets=[Contrast(5, 7)], max_feature_nodes=20, slug="contrast")
    details = {"feature_details": {"neuronpedia_source_set": "x"}, "info": {"creator_name": "me", "create_time_ms": 1}}
    path = write_circuit_tracer_json(graph.prune(), tmp_path, scan="gemma-2-2b", info=details)
    check(json.loads(path.read_text()), "graph")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden graph at {GOLDEN}")
def test_circuit_tracers_own_graph_is_valid_too():
    folder = GOLDEN / "out-transformerlens" / "json"
    check(json.loads((folder / "tiny.json").read_text()), "graph")
    check(json.loads((folder / "graph-metadata.json").read_text()), "graph", "list")


BREAKS = {
    "no links": lambda g: g.pop("links"),
    "no prompt": lambda g: g["metadata"].pop("prompt"),
    "slug is a path": lambda g: g["metadata"].update(slug="../elsewhere"),
    "a node without id": lambda g: g["nodes"][0].pop("node_id"),
    "a feature's number is a word": lambda g: g["nodes"][0].update(feature="3"),
    "a feature's number is beyond JavaScript": lambda g: g["nodes"][0].update(feature=2**53),
    "a feature's id has other parts": lambda g: g["nodes"][0].update(node_id="3"),
    "a logit's label without (p=": lambda g: g["nodes"][-1].update(clerp='Output "x"'),
    "a weight is a word": lambda g: g["links"][0].update(weight="1"),
    "a threshold above one": lambda g: g["metadata"].update(node_threshold=80),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_the_pages_could_not_draw_is_not_valid(exported, name):
    described = copy.deepcopy(exported[0])
    kinds = [node["feature_type"] for node in described["nodes"]]
    assert (kinds[0], kinds[-1]) == ("cross layer transcoder", "logit")
    BREAKS[name](described)
    with pytest.raises(jsonschema.ValidationError):
        check(described, "graph")


def test_feature_examples_and_their_index_are_valid(tmp_path):
    card = FeatureCard(
        {"Top activations": [Example(["a", "b"], [0.5, 2.0])]}, top_logits=["x"], bottom_logits=["y"], frequency=0.1,
        extra={"histogram": [1.0, 2.0], "quantile_values": [0.5, 2.0]},
    )  # fmt: skip
    folder = write_feature_examples({(1, 2): card}, tmp_path, n_layers=2, n_features=4, scan="/s")
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    check(index, "feature_examples", "index")
    assert [len(each["offsets"]) for each in index] == [5, 5]
    record = read_feature_example(folder, 1, 2)
    check(record, "feature_examples")
    with pytest.raises(jsonschema.ValidationError):
        check({**record, "index": "7"}, "feature_examples")
    with pytest.raises(jsonschema.ValidationError):
        check([{**index[0], "filename": "../x"}], "feature_examples", "index")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden graph at {GOLDEN}")
def test_clt_attribute_writes_a_valid_graph_under_the_scan_that_is_asked_for(tmp_path, capsys):
    read = ["--model", str(GOLDEN / "model"), "--transcoder", str(GOLDEN / "clt")]
    named = ["--prompt", (GOLDEN / "prompt.txt").read_text(), "--scan", "gemma-2-2b", "--slug", "mine"]
    written = ["--out", str(tmp_path / "graph"), "--neuronpedia", str(tmp_path / "np")]
    main(["attribute", *read, *named, *written, "--json"])
    capsys.readouterr()
    described = json.loads((tmp_path / "np" / "mine.json").read_text())
    check(described, "graph")
    assert described["metadata"]["scan"] == "gemma-2-2b"
    check(json.loads((tmp_path / "np" / "graph-metadata.json").read_text()), "graph", "list")
