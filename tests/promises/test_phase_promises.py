"""The phase guide's scripts run as printed, on AMBER's and POPE's file formats, and write what it prints."""

import json
import re

import pytest
import torch

from clt.config import CLTConfig
from clt.discovery.layout import FIGURES
from clt.models import CrossLayerTranscoder
from tests.promises.commands import run_script, words
from tests.tiny_hosts import WIDTH, llava_model, llava_processor, tiny_image

ANALYZE = "python analyze_good_features.py --dataset amber --target-features 200 --min-per-layer 3"
VISUALIZE, MAP = "python visualize_top_features.py --dataset {}", "python map_clt_to_mlp.py --dataset {}"
N_LAYERS, N_FEATURES, N_IMAGES = 3, 96, 24
FEATURE_FIELDS = {
    *("layer", "feature_idx", "goodness_score", "frequency_ratio"),
    *("good_freq", "bad_freq", "good_avg_activation", "bad_avg_activation"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny random LLaVA that answers with letters, its transcoder, drawn images and both benchmarks' files."""
    folder = tmp_path_factory.mktemp("phases")
    torch.manual_seed(0)
    llava_model(seed=1).save_pretrained(folder / "host")
    llava_processor().save_pretrained(folder / "host")
    config = CLTConfig(
        num_features=N_FEATURES, num_layers=N_LAYERS, d_model=WIDTH, activation_fn="topk", topk_k=8, model_name="tiny"
    )
    CrossLayerTranscoder(config).save_pretrained(folder / "clt")
    (folder / "images").mkdir()
    for number in range(1, N_IMAGES + 1):
        tiny_image(number).save(folder / "images" / f"AMBER_{number}.jpg")
    write_amber(folder / "amber")
    write_pope(folder / "pope.json")
    return folder


def write_amber(folder):
    """AMBER's layout; what the host writes is nonsense, so every image wants one letter and forbids another."""
    (folder / "query").mkdir(parents=True)
    annotations = [
        {"id": n, "type": "generative", "truth": ["dog", "cat"], "hallu": ["car"]} for n in range(1, N_IMAGES + 1)
    ]
    queries = [{"id": n, "image": f"AMBER_{n}.jpg", "query": "Describe this image."} for n in range(1, N_IMAGES + 1)]
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "relation.json").write_text(json.dumps({"dog": [], "cat": [], "car": []}))
    (folder / "safe_words.txt").write_text("sign")
    for name in ("query_all", "query_generative"):
        (folder / "query" / f"{name}.json").write_text(json.dumps(queries))


def write_pope(path):
    rows = [
        {
            "question_id": n,
            "image": f"AMBER_{1 + n % N_IMAGES}.jpg",
            "text": f"Is there a thing {n} in the image?",
            "label": ("yes", "no")[(n // N_IMAGES + n) % 2],
        }
        for n in range(1, 2 * N_IMAGES + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def captured(monkeypatch, made, here, benchmark, *more):
    data = made / ("amber" if benchmark == "amber" else "pope.json")
    arguments = ["--data", data, "--images", made / "images", "--model", made / "host", "--clt", made / "clt"]
    arguments += ["--max-new-tokens", "6", "--batch-size", "8", *more]
    monkeypatch.chdir(here)
    run_script(monkeypatch, f"capture_{benchmark}_activations.py", list(map(str, arguments)))


def mark(here, benchmark, n):
    """Give the answers a quality: a random host's are all equally bad. Every third response becomes a good one."""
    path = here / "results" / benchmark / "answer" / "model_responses.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for place, row in enumerate(rows):
        row["response"] = "a dog and a cat" if place % 3 == 0 else "a car"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(rows) == n


def test_amber_from_capture_to_mapping_by_the_guides_scripts(made, tmp_path, monkeypatch):
    captured(monkeypatch, made, tmp_path, "amber")
    first = torch.load(tmp_path / "activations/amber/sample_0001.pt", weights_only=True)
    assert list(first) == list(range(N_LAYERS))
    mark(tmp_path, "amber", N_IMAGES)
    run_script(monkeypatch, "classify_amber_simple.py", ["--min-samples", "5"])
    lists = json.loads((tmp_path / "analysis/amber_classification.json").read_text())
    assert set(lists) == {"GOOD", "BAD"}
    assert (len(lists["GOOD"]), len(lists["BAD"])) == (8, 16)
    assert lists["GOOD"][0]["id"] == 1
    assert lists["GOOD"][0]["coverage"] == 1.0
    run_script(monkeypatch, "analyze_good_features.py", words(ANALYZE))
    found = json.loads((tmp_path / "analysis/amber_good_features.json").read_text())
    check_features(found, "amber", 8, 16)
    run_script(monkeypatch, "visualize_top_features.py", [*words(VISUALIZE.format("amber")), "--examples", "4"])
    check_figures(tmp_path, "amber")
    run_script(monkeypatch, "map_clt_to_mlp.py", words(MAP.format("amber")))
    check_mapping(tmp_path, "amber", found)


def check_features(found, dataset, n_good, n_bad):
    assert found["dataset"] == dataset
    assert (found["total_good_samples"], found["total_bad_samples"]) == (n_good, n_bad)
    assert found["selected_features_count"] == len(found["features"]) <= 200
    assert found["selected_features_count"] == min(200, sum(found["layer_distribution"].values()))
    assert set(found["layer_distribution"]) == {"0", "1", "2"}
    assert all(count >= 3 for count in found["layer_distribution"].values())
    for feature in found["features"]:
        assert set(feature) >= FEATURE_FIELDS
        ratio = feature["good_freq"] / (feature["bad_freq"] + found["options"]["epsilon"])
        assert feature["frequency_ratio"] == pytest.approx(ratio)
        assert feature["goodness_score"] == pytest.approx(ratio * feature["good_avg_activation"])


def check_figures(here, dataset):
    for name in FIGURES:
        path = here / "analysis" / "visualizations" / f"{dataset}_{name}.png"
        assert path.read_bytes()[:4] == b"\x89PNG"
    page = (here / "analysis" / f"{dataset}_report.html").read_text()
    assert not re.search(r"(src|href)=.?http", page)
    assert "data:image/png" in page
    (first, *_) = sorted((here / "analysis" / f"{dataset}_examples").iterdir())
    example = json.loads(first.read_text())
    assert {"transcoder_id", "index", "examples_quantiles", "act_max", "activation_frequency"} <= set(example)
    for one in example["examples_quantiles"][0]["examples"]:
        assert len(one["tokens"]) == len(one["tokens_acts_list"])
        assert one["tokens_acts_list"][one["train_token_ind"]] == pytest.approx(one["activation"], abs=1e-4)


def check_mapping(here, dataset, found):
    mapping = json.loads((here / "analysis" / f"{dataset}_clt_to_mlp_mapping.json").read_text())
    assert len(mapping) == len(found["features"])
    entry = mapping[0]
    assert set(entry) >= {"feature", "top_mlp_neurons", "amplification_factor"}
    assert set(entry["feature"]) == {"layer", "feature_idx", "goodness_score"}
    assert entry["amplification_factor"] == 2.0
    assert entry["space"] == "mlp_output"
    assert set(entry["top_mlp_neurons"][0]) == {"neuron_idx", "weight"}
    weights = [abs(neuron["weight"]) for neuron in entry["top_mlp_neurons"]]
    assert weights == sorted(weights, reverse=True)
    assert set(entry["true_mlp_neurons"][0]) == {"layer", "neuron_idx", "weight", "score"}


def test_pope_from_capture_to_steering(made, tmp_path, monkeypatch):
    captured(monkeypatch, made, tmp_path, "pope")
    rows = [
        json.loads(line) for line in (tmp_path / "results/pope/answer/model_responses.jsonl").read_text().splitlines()
    ]
    assert [row["id"] for row in rows] == list(range(1, 2 * N_IMAGES + 1))
    run_script(monkeypatch, "classify_pope_simple.py", ["--min-samples", "5"])
    run_script(monkeypatch, "analyze_good_features.py", ["--dataset", "pope", "--target-features", "40", "--effects"])
    content = json.loads((tmp_path / "analysis/pope_good_features.json").read_text())
    assert {feature["direction"] for feature in content["features"]} <= {"harmful", "helpful"}
    steer = ["--features", "4", "--doses", "1.0", "--controls", "2", "--learned", "0", "--patch-samples", "8"]
    run_script(monkeypatch, "steer_pope_features.py", steer)
    steered = json.loads((tmp_path / "analysis/pope_steering.json").read_text())
    assert {row["where"] for row in steered["results"]} == {"host", "replacement", "neurons"}
    for row in steered["results"]:
        change = row["changes"]["accuracy"]
        assert change["interval"][0] <= change["value"] <= change["interval"][1]
        assert len(row["controls"]["accuracy"]["draws"]) == 2
    reported = steered["n_samples"]
    assert 0 < reported < 2 * N_IMAGES


def test_a_killed_capture_goes_on_and_both_files_agree(made, tmp_path, monkeypatch, capsys):
    captured(monkeypatch, made, tmp_path, "pope")
    answers = tmp_path / "results/pope/answer/model_responses.jsonl"
    whole, folder = answers.read_text(), tmp_path / "activations/pope"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = whole.splitlines(keepends=True)
    # Killed after writing the file of one more sample than the responses list, in the middle of a line.
    answers.write_text("".join(lines[:20]) + lines[20][:15])
    for number in range(23, len(lines) + 1):
        (folder / f"sample_{number:04d}.pt").unlink()
    (folder / "sample_0003.pt").unlink()
    captured(monkeypatch, made, tmp_path, "pope")
    assert answers.read_text() == whole
    assert {path.name for path in folder.iterdir()} == set(files)
    with pytest.raises(SystemExit):
        captured(monkeypatch, made, tmp_path, "pope", "--suffix", " Say yes or no.")
    assert "were made with run" in capsys.readouterr().err


def test_phases_out_of_order_and_empty_classes_are_explained(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script, missing in (("analyze_good_features.py", "capture"), ("map_clt_to_mlp.py", "capture")):
        with pytest.raises(SystemExit):
            run_script(monkeypatch, script, ["--dataset", "amber"])
        assert f"clt phase {missing}" in capsys.readouterr().err
    captured(monkeypatch, made, tmp_path, "amber")
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "classify_amber_simple.py", [])
    assert "GOOD" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "analyze_good_features.py", ["--dataset", "amber"])
    assert "clt phase classify" in capsys.readouterr().err


def test_dense_files_are_the_seeds_and_give_the_same_analysis(made, tmp_path, monkeypatch):
    found = []
    for name, more in (("packed", []), ("dense", ["--dense"])):
        here = tmp_path / name
        here.mkdir()
        captured(monkeypatch, made, here, "amber", *more)
        mark(here, "amber", N_IMAGES)
        run_script(monkeypatch, "classify_amber_simple.py", ["--min-samples", "5"])
        run_script(monkeypatch, "analyze_good_features.py", words(ANALYZE))
        found.append(json.loads((here / "analysis/amber_good_features.json").read_text()))
    one, two = found
    first = torch.load(tmp_path / "dense/activations/amber/sample_0002.pt", weights_only=True)
    assert first[0].shape[1] == N_FEATURES
    same = {(row["layer"], row["feature_idx"]): row for row in two["features"]}
    for row in one["features"]:
        other = same[row["layer"], row["feature_idx"]]
        assert row["good_freq"] == other["good_freq"]
        assert row["good_avg_activation"] == pytest.approx(other["good_avg_activation"], rel=0.025)
