"""A graph as one HTML file: it carries what it shows, and nothing that could break out of it."""

import base64
import json
import re

import numpy as np
import pytest

from clt.attribution.view_files import open_view
from clt.errors import GraphError
from clt.viz.graph_page import graph_page, write_graph_page
from tests.synthetic_graphs import write_examples, write_graph_folder


@pytest.fixture
def folder(tmp_path):
    return write_graph_folder(tmp_path / "one", n_features=50, n_layers=3, grid=(2, 2))


def data_of(page):
    return json.loads(re.search(r'id="graph-data">(.*?)</script>', page, re.DOTALL)[1])


def edges_of(data):
    raw, n_nodes = base64.b64decode(data["edges"]), len(data["graph"]["nodes"]["id"])
    n = (len(raw) // 4 - n_nodes) // 3
    source, target = (np.frombuffer(raw, "<u4", n, part * n * 4) for part in (0, 1))
    return source, target, np.frombuffer(raw, "<f4", n, 2 * n * 4), np.frombuffer(raw, "<f4", n_nodes, 3 * n * 4)


def test_a_page_carries_all_edges_of_a_small_graph(folder):
    view = open_view(folder)
    data = data_of(graph_page(view))
    source, target, weight, totals = edges_of(data)
    packed = sorted(zip(source.tolist(), target.tolist(), weight.tolist()))
    assert packed == sorted(zip(view.edges.source.tolist(), view.edges.target.tolist(), view.edges.weight.tolist()))
    np.testing.assert_allclose(totals, view.edges.totals, rtol=1e-6)
    assert data["graph"]["n_edges_here"] == data["graph"]["n_edges"] == len(view.edges)


def test_a_page_of_a_large_graph_carries_the_strongest_edges_and_says_so(folder):
    data = data_of(graph_page(open_view(folder), max_edges=100))
    assert data["graph"]["n_edges_here"] == 100 < data["graph"]["n_edges"]
    assert len(edges_of(data)[0]) == 100


def test_a_page_carries_examples_images_and_notes(folder, tmp_path):
    view = open_view(folder)
    node = int(np.argmin(view.nodes.cumulative[:40]))
    pair = (int(view.nodes.layer[node]), int(view.nodes.feature[node]))
    features = write_examples(tmp_path / "features", [pair])
    write_graph_page(folder, tmp_path / "pages" / "one.html", features=features)
    data = data_of((tmp_path / "pages" / "one.html").read_text())
    assert list(data["examples"]) == [f"{pair[0]}/{pair[1]}"]
    assert data["graph"]["images"][0]["src"].startswith("data:image/png;base64,")
    assert data["graph"]["explained"][next(iter(view.labels))]["text"] == "capital cities"


def test_text_of_a_prompt_cannot_leave_the_data(folder):
    about = json.loads((folder / "graph.json").read_text())
    about["prompt"] = "</script><script>alert(1)</script><!--"
    (folder / "graph.json").write_text(json.dumps(about))
    page = graph_page(open_view(folder))
    assert data_of(page)["graph"]["prompt"] == about["prompt"]
    assert page.count("</script>") == 2


def test_a_missing_graph_is_refused(tmp_path):
    with pytest.raises(GraphError, match="does not exist"):
        write_graph_page(tmp_path / "none.json", tmp_path / "page.html")
