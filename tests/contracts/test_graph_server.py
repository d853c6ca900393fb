"""The graph browser's server: what a page asks for, and what nobody may."""

import gzip
import json

import pytest
from PIL import Image
from starlette.testclient import TestClient

from clt.attribution.view_files import open_view
from clt.discovery.labels import LABELS_FILE, FeatureLabel, write_labels
from clt.errors import ConfigError, DatasetError, GraphError
from clt.serve.browser_guard import hosts_of
from clt.serve.graph_library import GraphLibrary
from clt.serve.graph_server import create_app
from clt.types import FeatureId
from tests.synthetic_graphs import binary_record, write_examples, write_graph_folder


@pytest.fixture
def root(tmp_path):
    write_graph_folder(tmp_path / "graphs" / "dallas", n_features=40, n_layers=3)
    return tmp_path / "graphs"


@pytest.fixture
def features(root, tmp_path):
    view = open_view(root / "dallas")
    pairs = [(int(view.nodes.layer[node]), int(view.nodes.feature[node])) for node in range(5)]
    return write_examples(tmp_path / "features", pairs), pairs


def client(root, features=None, **options):
    app = create_app(GraphLibrary(root, features), **options)
    return TestClient(app, base_url="http://127.0.0.1:8000")


def test_the_page_needs_nothing_from_elsewhere(root):
    with client(root) as browser:
        page = browser.get("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "http" not in page.text
        for name in ("graphs.js", "graphs.css"):
            assert name in page.text
            assert browser.get(f"/{name}").status_code == 200


def test_graphs_are_listed_opened_and_asked_for_edges(root):
    view = open_view(root / "dallas")
    with client(root) as browser:
        (listed,) = browser.get("/api/graphs").json()["graphs"]
        assert listed["slug"] == "dallas"
        graph = browser.get("/api/graphs/dallas").json()
        assert graph["nodes"]["id"] == list(view.nodes.id)
        assert browser.get("/api/graphs/dallas/links/7").json() == json.loads(json.dumps(view.links(7)))
        among = browser.post("/api/graphs/dallas/among", json={"nodes": [0, 20, 39]}).json()
        assert among == json.loads(json.dumps(view.among([0, 20, 39])))
        assert len(browser.get("/api/graphs/dallas/overview").json()["source"]) > 0


def test_what_is_not_there_is_said(root):
    with client(root) as browser:
        assert browser.get("/api/graphs/nobody").status_code == 404
        assert browser.get("/api/graphs/dallas/links/999999").status_code == 404
        assert browser.get("/api/graphs/dallas/links/-1").status_code == 422
        assert browser.post("/api/graphs/dallas/among", json={"nodes": [10**6]}).status_code == 404
        dose = {"layer": 0, "feature": 0, "position": None, "mode": "scale", "value": 2}
        answer = browser.post("/api/graphs/dallas/steer", json=dose)
        assert "--model" in answer.json()["detail"]


@pytest.mark.parametrize(
    "slug", ["%2e%2e%2fsecret", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "dallas%2f..%2f..", "dallas/graph.json"]
)
def test_no_name_leads_out_of_the_folder(root, slug):
    (root.parent / "secret.json").write_text('{"metadata": {}, "nodes": [], "links": []}')
    with client(root) as browser:
        for path in (f"/api/graphs/{slug}", f"/{slug}", f"/api/graphs/{slug}/overview"):
            assert browser.get(path).status_code in (404, 405)
        assert browser.put(f"/api/graphs/{slug}/notes", json={}).status_code in (404, 405)


def test_a_link_out_of_the_folder_is_not_followed(root):
    write_graph_folder(root.parent / "elsewhere", n_features=10)
    (root / "linked").symlink_to(root.parent / "elsewhere")
    with client(root) as browser:
        assert [graph["slug"] for graph in browser.get("/api/graphs").json()["graphs"]] == ["dallas"]


def test_only_pages_of_this_server_may_write(root):
    notes = {"pinned": [], "supernodes": [], "labels": {}, "threshold": None}
    with client(root) as browser:
        put = browser.put
        assert put("/api/graphs/dallas/notes", json=notes, headers={"origin": "http://evil.example"}).status_code == 403
        assert put("/api/graphs/dallas/notes", json=notes, headers={"origin": "null"}).status_code == 403
        assert put("/api/graphs/dallas/notes", json=notes, headers={"origin": "http://127.0.0.1:9"}).status_code == 403
        assert put("/api/graphs/dallas/notes", content="{}", headers={"content-type": "text/plain"}).status_code == 415
        assert not (root / "dallas" / "notes.json").exists()
        assert (
            put("/api/graphs/dallas/notes", json=notes, headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
        )
        assert (root / "dallas" / "notes.json").exists()


def test_foreign_names_of_this_machine_are_refused(root):
    with client(root) as browser:
        for host in ("evil.example", "evil.example:8000", ""):
            assert browser.get("/api/graphs", headers={"host": host}).status_code == 403
        assert browser.get("/api/graphs", headers={"host": "localhost:8000"}).status_code == 200


def test_a_token_is_asked_for_once_and_kept_in_a_cookie(root):
    with client(root, hosts=None, token="geheim") as browser:
        assert browser.get("/").status_code == 401
        assert browser.get("/?token=wrong").status_code == 401
        page = browser.get("/?token=geheim")
        assert page.status_code == 200
        assert "HttpOnly" in page.headers["set-cookie"]
        assert browser.get("/api/graphs").status_code == 200


def test_strangers_are_never_served_without_a_token(root):
    with pytest.raises(ConfigError, match="token"):
        client(root, hosts=hosts_of("0.0.0.0"))
    assert hosts_of("127.0.0.1") == {"127.0.0.1", "localhost", "::1"}


def test_large_bodies_are_refused(root):
    with client(root) as browser:
        assert browser.put("/api/graphs/dallas/notes", json={"pinned": ["x" * 2**23]}).status_code == 413


def test_notes_are_kept_and_labels_go_to_the_transcoder(root, features):
    folder, ((layer, feature), *_) = features
    key = f"{layer}/{feature}"
    write_labels(folder / LABELS_FILE, {key: FeatureLabel(text="by a model", source="m", detection=0.9)})
    view = open_view(root / "dallas")
    notes = {
        "pinned": [view.nodes.id[0]],
        "supernodes": [{"name": "g", "nodes": [view.nodes.id[0]]}],
        "labels": {key: "by hand"},
        "threshold": 0.3,
    }
    write_graph_folder(root / "other", n_features=40, n_layers=3)
    with client(root, folder) as browser:
        assert browser.put("/api/graphs/dallas/notes", json=notes).json() == {"saved": True}
        assert browser.get("/api/graphs/dallas").json()["notes"] == notes
        other = browser.get("/api/graphs/other").json()
        assert other["notes"]["labels"] == {key: "by hand"}
        assert other["explained"][key]["text"] == "by a model"
        assert browser.put("/api/graphs/dallas/notes", json={**notes, "labels": {"x": "y"}}).status_code == 422


def test_examples_are_found_in_both_layouts(root, features):
    folder, ((layer, feature), *_) = features
    with client(root, folder) as browser:
        single = browser.get(f"/api/graphs/dallas/features/{layer}/{feature}").json()
        assert single["top_logits"][0] == " Austin"
        assert browser.get("/api/graphs/dallas/features/0/999999999").json() is None
    binary = folder.parent / "binary"
    binary.mkdir()
    record = binary_record(single)
    (binary / "layer.bin").write_bytes(record)
    offsets = [0] * (feature + 1) + [len(record)]
    index = [{"filename": "layer.bin", "offsets": offsets if number == layer else [0]} for number in range(layer + 1)]
    (binary / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))
    with client(root, binary) as browser:
        assert browser.get(f"/api/graphs/dallas/features/{layer}/{feature}").json() == single
        assert browser.get(f"/api/graphs/dallas/features/{layer}/{feature + 1}").json() is None
        (binary / "layer.bin").write_bytes(record[:20])
        answer = browser.get(f"/api/graphs/dallas/features/{layer}/{feature}")
        assert answer.status_code == 422
        assert "cannot be read" in answer.json()["detail"]


def test_images_of_examples_come_from_the_named_folder_only(root, features, tmp_path):
    folder, ((layer, feature), *_) = features
    path = folder / f"{FeatureId(layer, feature).number}.json"
    record = json.loads(path.read_text())
    (tmp_path / "images").mkdir()
    Image.new("RGB", (500, 300), "red").save(tmp_path / "images" / "cat.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "secret.png")
    examples = record["examples_quantiles"][0]["examples"]
    for example, name in zip(examples, ["cat.png", "../secret.png", str(tmp_path / "secret.png"), "gone.png"]):
        example["image_references"] = [{"image": name, "patch_activations": [0, 1, 2, 0]}]
    path.write_text(json.dumps(record))
    app = create_app(GraphLibrary(root, folder, tmp_path / "images"))
    with TestClient(app, base_url="http://127.0.0.1:8000") as browser:
        answer = browser.get(f"/api/graphs/dallas/features/{layer}/{feature}").json()
    shown = [example.get("images", [{}])[0] for example in answer["examples_quantiles"][0]["examples"]]
    assert shown[0]["src"].startswith("data:image/jpeg;base64,")
    assert (shown[0]["rows"], shown[0]["columns"]) == (2, 2)
    assert [picture.get("src") for picture in shown[1:4]] == ["", "", ""]


def test_files_that_are_no_graphs_are_named_with_the_reason(root):
    (root / "broken.json").write_text('{"something": 1}')
    (root / "cut.json").write_text('{"metadata": {"prompt": "a"}, "nodes": [')
    with client(root) as browser:
        listed = browser.get("/api/graphs").json()
        assert listed["refused"] == [{"file": "broken.json", "reason": "no graph: it has neither metadata nor nodes"}]
        assert "no whole JSON" in browser.get("/api/graphs/cut").json()["detail"]


def test_missing_folders_are_refused_at_once(root, tmp_path):
    with pytest.raises(GraphError, match="does not exist"):
        GraphLibrary(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no feature examples"):
        GraphLibrary(root, tmp_path / "empty")


def test_a_single_graph_may_be_served(root):
    with client(root / "dallas") as browser:
        assert [graph["slug"] for graph in browser.get("/api/graphs").json()["graphs"]] == ["dallas"]
