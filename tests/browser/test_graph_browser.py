"""The graph page in a browser: text and image graphs, pins, filters, search, supernodes, steering, a saved page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from clt.attribution.view import FEATURE
from clt.attribution.view_files import open_view
from clt.discovery.examples import Shown, TopExamples, feature_json
from clt.discovery.examples import write_examples as write_collected_examples
from clt.discovery.features_file import LayerFeatures
from clt.discovery.labels import LABELS_FILE, FeatureLabel, write_labels
from clt.serve.graph_library import GraphLibrary
from clt.serve.graph_server import create_app
from clt.serve.live_steering import LiveSteering
from clt.types import FeatureId
from clt.viz.graph_page import write_graph_page
from tests.running import running
from tests.synthetic_graphs import write_examples, write_graph_folder
from tests.tiny_hosts import plain_transcoder, tiny_adapter

QUESTION = ["<s>", "USER", ":", "Is", "there", "a", "star", "in", "the", "image", "?", "ASSISTANT", ":"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two graphs and examples of the first one's features; the first fits the tiny host that steers."""
    folder = tmp_path_factory.mktemp("browser")
    text = write_graph_folder(folder / "graphs" / "dallas", n_features=120, n_layers=3, dictionary=12)
    write_graph_folder(folder / "graphs" / "picture", n_features=200, n_layers=8, grid=(4, 5), tokens=QUESTION, seed=3)
    alike = {"grid": (4, 5), "alike": (2, 3, 7), "tokens": QUESTION, "seed": 3}
    write_graph_folder(folder / "graphs" / "grouped", n_features=200, n_layers=8, **alike)
    nodes = open_view(text).nodes
    pairs = {(int(nodes.layer[node]), int(nodes.feature[node])) for node in range((nodes.kind == FEATURE).sum())}
    write_examples(folder / "features", sorted(pairs))
    write_collected(folder, "picture")
    label = FeatureLabel(text="explained by a model", source="teacher", detection=0.9, fuzzing=0.8)
    write_labels(folder / "features" / LABELS_FILE, {"1/3": label})
    return folder


def write_collected(folder, graph):
    """Examples of a graph's first feature as the collector writes them: text around an image of 3 x 3 patches."""
    nodes = open_view(folder / "graphs" / graph).nodes
    feature = FeatureId(int(nodes.layer[0]), int(nodes.feature[0]))
    top = TopExamples([feature], per_feature=3)
    for number in range(3):
        places = np.array([2, 3, 6, 12]) + number % 2
        values = np.array([4.0, 2.0, 1.0, 3.0], dtype=np.float32) - number
        layer = LayerFeatures(np.full(4, feature.feature), places, values, 16, feature.feature + 1)
        top.add(number, {feature.layer: layer})
    tokens = ["<s>", *["<image>"] * 9, " Is", " there", " a", " star", "?", " Yes"]
    shown = Shown("0", tokens, range(1, 10), "star.png", " Yes", None)
    write_collected_examples(folder / "features", [feature_json(feature, top, lambda number: shown, transcoder_id="x")])
    Image.radial_gradient("L").convert("RGB").save(folder / "features" / "star.png")


@pytest.fixture(scope="module")
def address(folder):
    adapter = tiny_adapter("gpt2")
    steering = LiveSteering(adapter, plain_transcoder(adapter, num_features=12), max_new_tokens=6)
    with running(create_app(GraphLibrary(folder / "graphs", folder / "features"), steering=steering)) as url:
        yield url


def opened(page, address, graph):
    page.goto(f"{address}/#graph={graph}")
    page.get_by_test_id("count").wait_for()


def shoot(page, screenshots, name):
    if screenshots is not None:
        page.wait_for_timeout(300)
        page.screenshot(path=screenshots / f"{name}.png")


def shown(page):
    return int(page.get_by_test_id("count").inner_text().split(" of ")[0].replace(",", ""))


def pick(page, text):
    """Search, and open the first that is found."""
    page.keyboard.press("/")
    page.get_by_test_id("search").fill(text)
    page.keyboard.press("Enter")
    page.get_by_test_id("links-inputs").wait_for()


def test_a_text_graph_is_filtered_searched_and_read(page, address, screenshots):
    opened(page, address, "dallas")
    some = shown(page)
    page.get_by_test_id("influence").fill("1")
    assert shown(page) > some
    page.get_by_test_id("influence").fill("0.2")
    assert shown(page) < some
    page.get_by_test_id("influence").fill("0.8")
    page.keyboard.press("/")
    page.get_by_test_id("search").fill("zebra")
    page.get_by_text("Nothing matches").wait_for()
    pick(page, "feature dallas")
    assert "Feature" in page.get_by_test_id("node-name").inner_text()
    page.get_by_test_id("examples").first.wait_for()
    assert page.get_by_test_id("links-inputs").locator("li").count() > 3
    first = page.get_by_test_id("links-inputs").locator("li button").first
    wanted = re.split(r"[“\n]", first.locator(".name").inner_text())[0].strip()
    first.click()
    page.get_by_test_id("node-name").filter(has_text=wanted).wait_for()
    page.get_by_test_id("theme").click()
    shoot(page, screenshots, "text-dark")


def test_labels_of_a_model_are_shown_and_can_be_replaced_by_hand(page, address):
    opened(page, address, "dallas")
    pick(page, "explained by a model")
    page.get_by_text("Label by teacher; detection 90%").wait_for()
    page.get_by_role("button", name="Label").click()
    page.get_by_role("textbox", name="Label of this feature").fill("by hand")
    page.keyboard.press("Enter")
    assert page.get_by_test_id("node-name").inner_text() == "by hand"
    page.get_by_role("status").filter(has_text=re.compile("^Saved$")).wait_for()
    page.reload()
    page.get_by_test_id("node-name").filter(has_text="by hand").wait_for()


def test_supernodes_are_made_named_and_kept(page, address, folder, screenshots):
    opened(page, address, "dallas")
    page.get_by_test_id("pin-strongest").click()
    boxes = page.get_by_test_id("box")
    boxes.nth(12).wait_for()
    for place in (2, 3):
        boxes.nth(place).click(modifiers=["Shift"])
    page.get_by_test_id("group").click()
    page.get_by_test_id("group-name").fill("say Texas")
    page.keyboard.press("Enter")
    boxes.filter(has_text="say Texas").wait_for()
    assert boxes.count() == 12
    shoot(page, screenshots, "supernode")
    page.get_by_role("status").filter(has_text=re.compile("^Saved$")).wait_for()
    notes = json.loads((folder / "graphs" / "dallas" / "notes.json").read_text())
    assert [group["name"] for group in notes["supernodes"]] == ["say Texas"]
    assert len(notes["pinned"]) == 13
    page.reload()
    boxes.filter(has_text="say Texas").wait_for()
    page.get_by_role("button", name="Unpin all").click()
    page.get_by_test_id("pin-strongest").wait_for()
    page.get_by_role("status").filter(has_text=re.compile("^Saved$")).wait_for()


def test_the_graph_is_walked_and_pinned_by_keys(page, address):
    opened(page, address, "dallas")
    page.get_by_test_id("graph").focus()
    names = []
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
        page.get_by_test_id("links-inputs").or_(page.get_by_test_id("links-outputs")).first.wait_for()
        names.append(page.locator("#graph-status").inner_text())
    assert len(set(names)) == 4
    page.keyboard.press("p")
    assert page.get_by_test_id("box").count() == 1
    page.keyboard.press("p")
    page.get_by_test_id("pin-strongest").wait_for()
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()


def test_patches_of_an_image_are_shown_with_what_they_do(page, address, screenshots):
    opened(page, address, "picture")
    patches = page.get_by_test_id("patches").locator("rect")
    assert patches.count() == 20
    pick(page, "austin")
    heated = page.get_by_test_id("patches").locator("rect[data-heat]")
    heated.first.wait_for()
    shoot(page, screenshots, "image")
    patches.nth(7).click()
    page.get_by_test_id("node-name").filter(has_text="patch 2, 3").wait_for()


def test_collected_examples_show_heat_in_the_text_and_patches_of_the_image(page, address, folder, screenshots):
    opened(page, address, "picture")
    nodes = open_view(folder / "graphs" / "picture").nodes
    pick(page, nodes.id[0])
    examples = page.get_by_test_id("examples").locator("li")
    examples.nth(2).wait_for()
    assert examples.nth(0).locator("svg rect").count() == 3
    assert examples.nth(0).locator("svg image").get_attribute("href").startswith("data:image/")
    heated = [word for word in examples.nth(0).locator("button span").all() if word.get_attribute("style")]
    assert [word.inner_text().strip() for word in heated] == ["a"]
    examples.nth(2).scroll_into_view_if_needed()
    shoot(page, screenshots, "examples")


def test_alike_patches_are_one_node_with_all_their_outlines(page, address, screenshots):
    opened(page, address, "grouped")
    patches = page.get_by_test_id("patches").locator("rect")
    assert patches.count() == 20
    patches.nth(6).click()
    page.get_by_test_id("node-name").filter(has_text="patch 1, 2 and 2 like it").wait_for()
    assert page.get_by_test_id("patches").locator("rect.here").count() == 3
    shoot(page, screenshots, "grouped-patches")


def test_a_feature_is_steered_live(page, address, screenshots):
    opened(page, address, "dallas")
    pick(page, "feature is")
    page.get_by_label("at every position").check()
    page.get_by_label("Dose as a number").fill("40")
    page.get_by_label("Dose as a number").press("Enter")
    steered = page.get_by_test_id("steered")
    steered.wait_for()
    assert steered.locator("tbody tr").count() >= 6
    changes = steered.locator("tbody tr td:last-child").all_inner_texts()
    assert any(change not in ("0", "+0") for change in changes)
    steered.scroll_into_view_if_needed()
    shoot(page, screenshots, "steering")
    page.get_by_label("Dose as a number").fill("1")
    page.get_by_label("Dose as a number").press("Enter")
    steered.get_by_text("the same").wait_for()


def test_a_saved_page_works_without_a_server(page, folder, tmp_path):
    file = tmp_path / "dallas.html"
    write_graph_page(folder / "graphs" / "dallas", file, features=folder / "features")
    page.goto(file.as_uri())
    page.get_by_test_id("count").wait_for()
    pick(page, "feature dallas")
    assert page.get_by_test_id("links-inputs").locator("li").count() > 3
    page.get_by_test_id("examples").first.wait_for()
    page.get_by_text("Live steering needs the model").wait_for()
    page.keyboard.press("Escape")
    page.get_by_test_id("pin-strongest").click()
    page.get_by_test_id("box").nth(12).wait_for()


def test_an_empty_folder_says_what_to_do(page, tmp_path):
    (tmp_path / "broken.json").write_text('{"a": 1}')
    with running(create_app(GraphLibrary(tmp_path))) as url:
        page.goto(url)
        page.get_by_text("No graphs here yet").wait_for()
        page.get_by_text("it has neither metadata nor nodes").wait_for()
