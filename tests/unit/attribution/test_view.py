"""Views of graphs for a page: the numbers of the file, whatever its format."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from clt.attribution.notes import EMPTY, checked_notes, read_notes, write_notes
from clt.attribution.view import EMBEDDING, ERROR, FEATURE, LOGIT, EdgeTable
from clt.attribution.view_files import open_view, view_of_json
from clt.errors import GraphError
from clt.types import FeatureId
from tests.synthetic_graphs import write_graph_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_graph_folder(tmp_path_factory.mktemp("graphs") / "one", n_features=60, n_layers=4, grid=(2, 3))


def test_grouped_patches_have_one_embedding_node(tmp_path):
    graph = write_graph_folder(tmp_path / "g", n_features=60, n_layers=4, grid=(2, 3), alike=(2, 4, 5))
    view = open_view(graph)
    embeddings = view.nodes.position[view.nodes.kind == EMBEDDING].tolist()
    assert [position for position in range(7) if position not in embeddings] == [4, 5]
    assert not np.isin(view.nodes.position[view.nodes.kind == ERROR], [4, 5]).any()
    assert [(patch.position, patch.group) for patch in view.images[0].patches] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 2),
        (5, 2),
        (6, 6),
    ]


def small_json():
    def node(node_id, kind, layer, position, **more):
        return {"node_id": node_id, "feature_type": kind, "layer": str(layer), "ctx_idx": position, **more}

    number = FeatureId(1, 7).number
    nodes = [
        node("E_12_0", "embedding", "E", 0, feature=0),
        node("E_13_1", "embedding", "E", 1, feature=1),
        node("0_3_1", "cross layer transcoder", 0, 1, feature=FeatureId(0, 3).number, influence=0.4, activation=2.5),
        node("1_7_1", "cross layer transcoder", 1, 1, feature=number, influence=0.6, clerp="seven"),
        node("0_3_1", "mlp reconstruction error", 3, 1, feature=-1, influence=0.9),
        node("5_99_1", "logit", 5, 1, feature=99, token_prob=0.7, clerp='Output " Austin" (p=0.700)'),
    ]
    links = [("E_12_0", "0_3_1", 2.0), ("E_13_1", "0_3_1", -1.0), ("0_3_1", "1_7_1", 1.0), ("1_7_1", "5_99_1", 3.0)]
    return {
        "metadata": {"prompt": "a b", "prompt_tokens": ["a", " b"], "scan": "x/y", "node_threshold": 0.8},
        "qParams": {"pinnedIds": "1_7_1,5_99_1", "supernodes": '[["both", "1_7_1", "0_3_1"]]'},
        "nodes": nodes,
        "links": [{"source": source, "target": target, "weight": weight} for source, target, weight in links],
    }


def test_the_nodes_of_a_folder_are_those_of_its_format(folder):
    view, tensors = open_view(folder), load_file(folder / "graph.safetensors")
    n_features = len(tensors["features"])
    assert (view.nodes.kind[:n_features] == FEATURE).all()
    found = np.stack([view.nodes.layer, view.nodes.position, view.nodes.feature], 1)[:n_features]
    assert (found == tensors["features"]).all()
    assert (view.nodes.kind == EMBEDDING).sum() == len(view.tokens) == len(view.token_ids)
    assert [view.nodes.label[node] for node in np.flatnonzero(view.nodes.kind == LOGIT)] == [
        " Austin",
        " Texas",
        " the",
        " a",
    ]
    assert len(set(view.nodes.id)) == view.n_nodes


def test_every_edge_of_a_folder_is_found_from_both_ends(folder):
    view, tensors = open_view(folder), load_file(folder / "graph.safetensors")
    weights = np.zeros((view.n_nodes, view.n_nodes))
    for node in range(view.n_nodes):
        links = view.links(node)
        weights[node, links["inputs"]["node"]] = links["inputs"]["weight"]
        assert links["inputs"]["total"] == pytest.approx(view.edges.totals[node], rel=1e-5)
    for node in range(view.n_nodes):
        outputs = view.links(node)["outputs"]
        np.testing.assert_allclose(weights[outputs["node"], node], outputs["weight"])
        assert outputs["count"] == np.count_nonzero(weights[:, node])
    assert np.count_nonzero(weights) == len(tensors["weight"]) == len(view.edges)
    assert np.abs(weights).sum() == pytest.approx(np.abs(tensors["weight"]).sum(), rel=1e-4)


def test_edges_among_some_nodes_are_all_between_them(folder):
    view = open_view(folder)
    chosen = [0, 3, 9, 30, 59, view.n_nodes - 2]
    among = view.among(chosen)
    inside = np.isin(view.edges.source, chosen) & np.isin(view.edges.target, chosen)
    assert set(among["source"]) | set(among["target"]) <= set(chosen)
    assert len(among["weight"]) == inside.sum() > 0


def test_the_influence_of_a_folder_is_what_its_edges_say(folder):
    view = open_view(folder)
    saved = view.influence
    view.__dict__.pop("influence")
    np.testing.assert_allclose(view.influence, saved, rtol=1e-4, atol=1e-6)


def test_the_strongest_edges_are_those_with_the_highest_scores(folder):
    view = open_view(folder)
    chosen = view.strongest(25)
    assert sorted(view.edge_scores, reverse=True)[:25] == view.edge_scores[chosen].tolist()


def test_patches_lie_on_the_image_where_the_file_says(folder):
    (image,) = open_view(folder).images
    assert [tuple(patch[:3]) for patch in image.patches[:4]] == [(1, 0, 0), (2, 0, 1), (3, 0, 2), (4, 1, 0)]
    assert sum(patch.width * patch.height for patch in image.patches) == pytest.approx(1)
    assert image.data.startswith(b"\x89PNG")


def test_a_graph_of_circuit_tracer_is_read_with_pins_and_supernodes():
    view = view_of_json(small_json(), "small")
    assert view.nodes.kind.tolist() == [EMBEDDING, EMBEDDING, FEATURE, FEATURE, ERROR, LOGIT]
    assert view.nodes.feature.tolist() == [-1, -1, 3, 7, -1, -1]
    assert view.nodes.layer.tolist() == [-1, -1, 0, 1, 3, view.n_layers]
    assert view.token_ids == [12, 13]
    assert view.nodes.label[5] == " Austin"
    assert view.notes["supernodes"] == [{"name": "both", "nodes": ["1_7_1", "0_3_1"]}]
    assert set(view.notes["pinned"]) == {"1_7_1", "5_99_1", "0_3_1"}
    assert view.links(2)["inputs"] == {"node": [0, 1], "weight": [2.0, -1.0], "count": 2, "total": 3.0}


def test_an_error_that_is_named_like_a_feature_gets_a_name_of_its_own():
    view = view_of_json(small_json(), "small")
    assert len(set(view.nodes.id)) == view.n_nodes
    assert view.nodes.id[4] == "3_-1_1"


def test_a_graph_without_influence_gets_one():
    content = small_json()
    for node in content["nodes"]:
        node.pop("influence", None)
    cumulative = view_of_json(content, "small").nodes.cumulative
    assert (cumulative[:2] == 0).all()
    assert 0 < cumulative[2] <= cumulative[4] <= 1
    assert 0 < cumulative[3] <= cumulative[4]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda c: c.pop("links"), "no 'links'"),
        (lambda c: c["nodes"][0].pop("ctx_idx"), "ctx_idx"),
        (lambda c: c["links"][0].update(source="nobody"), "nobody"),
        (lambda c: c["nodes"][2].update(layer="x"), "x"),
    ],
)
def test_a_damaged_graph_is_refused_saying_what_is_wrong(break_it, message):
    content = small_json()
    break_it(content)
    with pytest.raises(GraphError, match=message):
        view_of_json(content, "small")


def test_a_folder_without_its_tensors_is_refused(tmp_path):
    folder = write_graph_folder(tmp_path / "g", n_features=10)
    (folder / "graph.safetensors").write_bytes(b"cut off")
    with pytest.raises(GraphError, match="safetensors"):
        open_view(folder)
    (folder / "graph.json").write_text("{")
    with pytest.raises(GraphError, match="no whole JSON"):
        open_view(folder)


@given(layer=st.integers(0, 10_000), feature=st.integers(0, 10**9))
def test_numbers_of_features_can_be_undone(layer, feature):
    assert FeatureId.from_number(FeatureId(layer, feature).number) == (layer, feature)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.floats(-5, 5, width=32)), max_size=30))
def test_edges_in_any_order_are_sorted_by_target(pairs):
    source, target, weight = (np.array(column) for column in zip(*pairs)) if pairs else (np.zeros(0, int),) * 3
    edges = EdgeTable.from_pairs(source, target, weight, 7)
    assert sorted(zip(edges.source.tolist(), edges.target.tolist(), edges.weight.tolist())) == sorted(
        (s, t, w) for s, t, w in pairs
    )


def test_notes_come_back_as_they_were_written(tmp_path):
    notes = {
        "pinned": ["1_7_1"],
        "supernodes": [{"name": "“quoted”", "nodes": ["1_7_1"]}],
        "labels": {"1/7": "sieben"},
        "threshold": 0.5,
    }
    assert read_notes(tmp_path / "none.json") is None
    write_notes(tmp_path / "notes.json", checked_notes(notes))
    assert read_notes(tmp_path / "notes.json") == notes


@pytest.mark.parametrize(
    "notes",
    [{"pinned": "x"}, {"supernodes": [["a", "b"]]}, {"labels": {"../x": "y"}}, {"threshold": "high"}, {"pinned": [1]}],
)
def test_notes_of_other_types_are_refused(notes):
    with pytest.raises(GraphError):
        checked_notes({**EMPTY, **notes})


def test_a_file_that_is_no_notes_is_refused(tmp_path):
    path = tmp_path / "notes.json"
    for text in ("{", json.dumps({"pinned": []})):
        path.write_text(text)
        with pytest.raises(GraphError, match="start anew"):
            read_notes(path)
