"""The demo in miniature: every stage on the real host, stopped and gone on with, its report self-contained."""

import json
import re
from dataclasses import replace

import pytest

from clt.errors import WorldError
from clt.scripts.demo import Options, pipeline
from clt.scripts.demo.stages import Stages

PROMISED = {"nmse", "l0_per_layer", "dead_share", "token_match", "kl", "top1", "features_per_layer", "train_seconds"}
TINY = replace(
    pipeline.QUICK,
    scenes=60,
    steps=20,
    batch_tokens=256,
    questions=12,
    descriptions=6,
    fidelity_samples=6,
    discovery_scenes=16,
    discovery_asked=16,
    controls=1,
    learned_features=20,
    gain_steps=2,
    graph_features=40,
)
STAGES = ("host", "activations", "clt", "clt-replacement", "plt", "plt-replacement", "discovery", "graph")


def demo_in(folder, amounts=TINY):
    demo = pipeline.Demo(Options(output_dir=str(folder), quick=True))
    demo.amounts = amounts
    return demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that was stopped after its CLT was trained and then gone on with: folder, summary, what was said."""
    folder = tmp_path_factory.mktemp("demo")
    stopped, said = demo_in(folder), []
    stopped._replacement_of = lambda name: interrupt
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert not (folder / "summary.json").exists()
    again = demo_in(folder)
    again.stages._say = said.append
    return folder, again.run(), said


def interrupt(_):
    raise KeyboardInterrupt


def test_the_demo_goes_on_where_it_was_stopped(finished):
    _, _, said = finished
    assert [line.split(":")[0] for line in said if "already done" in line] == ["host", "activations", "clt"]


def test_the_summary_holds_what_it_promises(finished):
    folder, summary, _ = finished
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for name in ("clt", "plt"):
        assert summary[name].keys() >= PROMISED
        assert max(summary[name]["l0_per_layer"]) <= 16
    assert summary["clt"]["features_per_layer"] == 512
    assert summary["clt"]["parameters"] > summary["plt"]["parameters"]
    for scores in (summary["host"], summary["replacement"], summary["replacement"]["plt"]):
        assert scores["pope"]["n"] == 12
        assert scores["amber_like"]["n"] == 6
    assert tuple(summary["seconds"]) == STAGES


def test_the_summary_tells_what_steering_changed_against_controls(finished):
    found = finished[1]["discovery"]
    assert [row["name"] for row in found["results"]] == ["chosen", "seed_score", "learned"]
    assert found["n_samples"] == 7 * found["n_images"]
    for row in found["results"]:
        for metric in ("hal", "chair", "cover", "adversarial_accuracy"):
            low, high = row["changes"][metric]["interval"]
            assert low <= row["changes"][metric]["value"] <= high
            assert len(row["controls"][metric]["draws"]) == 1
            assert len(row["learned_controls"].get(metric, {"draws": ()})["draws"]) == (row["name"] == "learned")


def test_the_graph_explains_an_object_that_is_not_there(finished):
    folder, summary, _ = finished
    graph = summary["graph"]
    assert graph["invented"] in graph["answer"]
    assert graph["n_patches"] == 9
    assert 0 < graph["n_kept"] < graph["n_nodes"]
    page = (folder / "graph" / graph["page"]).read_text()
    assert "data:image/jpeg" in page


def test_the_report_needs_nothing_but_itself(finished):
    folder = finished[0]
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 8
    links = [link for link in re.findall(r'(?:src|href)="([^"#]+)"', page) if not link.startswith("data:")]
    assert links == ["discovery/analysis/shapes_report.html", "graph/graph.html"]
    assert all((folder / link).is_file() for link in links)
    assert "<script" not in page


def test_a_stage_made_with_other_options_is_made_again(tmp_path):
    said = []
    for value in (1, 1, 2):
        stages = Stages(tmp_path, said.append)
        stages.run("first", {"value": value}, lambda folder: {})
        stages.run("second", {}, lambda folder: {"story": "depends on the first"})
    assert said == [
        "first: already done (0 s then)",
        "second: already done (0 s then)",
        "first: made with other options; starting over",
        "second: made with other options; starting over",
    ]


def test_a_world_that_does_not_exist_or_has_no_pictures_is_refused(tmp_path):
    with pytest.raises(WorldError, match="Did you mean 'shapes'"):
        pipeline.Demo(Options(output_dir=str(tmp_path), world="shape"))
    with pytest.raises(WorldError, match="vision-language host"):
        pipeline.Demo(Options(output_dir=str(tmp_path), world="two-hop"))
