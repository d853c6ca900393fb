"""A trained transcoder keeps its figures and its graph through every format it can be written in."""

import json

import pytest
import torch

from clt.__main__ import main
from clt.attribution import AttributionGraph

WORLD = "world:shapes"
FAMILIES = {
    "jumprelu": ["--activation-fn", "jumprelu"],
    "topk": ["--activation-fn", "topk", "--topk-k", "8"],
    "per layer": ["--activation-fn", "jumprelu", "--n-targets", "1"],
}
FORMATS = {
    "jumprelu": ("circuit-tracer", "crosslayer-coding", "clt-forge", "ours"),
    "topk": ("eleuther",),
    "per layer": ("saelens", "circuit-tracer"),
}


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    root = tmp_path_factory.mktemp("activations")
    main(["generate", "--model", WORLD, "--dataset", WORLD, "--max-samples", "60", "--activation-dir", str(root)])
    return next(root.glob("*/*"))


def figures(folder, activations, capsys, on_host=True):
    """What `clt evaluate` and `clt fidelity` measure, without the names of files."""
    capsys.readouterr()
    out = str(folder.with_suffix(".json"))
    data = ["--data", str(activations), "--activation-dtype", "float32"]
    main(["evaluate", "--clt", str(folder), *data, "--no-plots", "--output", out, "--json"])
    evaluation = json.loads(capsys.readouterr().out)
    kept = {name: evaluation[name] for name in ("n_tokens", "nmse", "nmse_per_layer", "l0_per_layer", "dead_per_layer")}
    if not on_host:
        return kept
    samples = ["--dataset", WORLD, "--samples", "4", "--max-new-tokens", "6", "--show", "0", "--output", out]
    main(["fidelity", "--model", WORLD, "--clt", str(folder), *samples, "--json"])
    fidelity = json.loads(capsys.readouterr().out)
    return kept | {name: value for name, value in fidelity.items() if isinstance(value, dict) and "interval" in value}


def graph_of(folder, capsys):
    given = ["--model", WORLD, "--transcoder", str(folder), "--prompt", "what", "--max-feature-nodes", "20"]
    main(["attribute", *given, "--out", str(folder.with_suffix(".graph")), "--json"])
    return AttributionGraph.load(json.loads(capsys.readouterr().out)["graph"])


def flat(values):
    if isinstance(values, dict):
        return [number for name in sorted(values) for number in flat(values[name])]
    return [number for each in values for number in flat(each)] if isinstance(values, list) else [values]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_figures_survive_export_and_import(family, activations, tmp_path, capsys):
    sizes = ["--num-features", "64", "--training-steps", "30", "--train-batch-size-tokens", "256"]
    mine = tmp_path / "mine"
    main(["train", "--data", str(activations), "--output-dir", str(mine), *sizes, *FAMILIES[family]])
    wanted = figures(mine, activations, capsys)
    assert wanted["nmse"] < 0.9
    assert len(wanted) > 8
    for name in FORMATS[family]:
        theirs, again = tmp_path / f"{name}-theirs", tmp_path / f"{name}-again"
        main(["export", "--clt", str(mine), "--format", name, "--output", str(theirs)])
        main(["import", str(theirs), str(again)])
        # CLT-Forge's files do not say where they read, so that theirs would be put elsewhere in a host.
        found = figures(again, activations, capsys, on_host=name != "clt-forge")
        expected = {key: wanted[key] for key in found}
        assert flat(found) == pytest.approx(flat(expected), rel=1e-4, abs=1e-5), name
    if "circuit-tracer" in FORMATS[family]:
        one, other = (graph_of(tmp_path / name, capsys) for name in ("mine", "circuit-tracer-theirs"))
        assert one.n_features == other.n_features == 20
        assert torch.equal(one.features, other.features)
        torch.testing.assert_close(other.row_value, one.row_value, rtol=1e-4, atol=1e-5)
