"""Replacements side by side: each column is what it is alone, and the command writes what the functions give."""

import json
from pathlib import Path

import pytest
import torch

import clt.__main__ as command_line
from clt.config import CLTConfig
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel, measure_fidelity
from clt.replacement.compare import MEAN, by_layers, compare, layer_counts
from clt.scripts.fidelity import Options, named
from clt.types import TokenKind
from tests.tiny_hosts import (
    N_LAYERS,
    TEXT_CONFIGS,
    WIDTH,
    from_config,
    plain_transcoder,
    tiny_adapter,
    tiny_samples,
    tiny_tokenizer,
)

HOW = {"max_new_tokens": 4, "n_resamples": 100}


def test_columns_are_the_reports_of_each_alone():
    adapter, samples = tiny_adapter("llava"), tiny_samples("llava")
    transcoders = {"CLT": plain_transcoder(adapter), "PLT": plain_transcoder(adapter, n_targets=1)}
    reports = compare(adapter, transcoders, samples, **HOW)
    assert list(reports) == ["CLT", "PLT", MEAN]
    for name, transcoder in transcoders.items():
        alone = measure_fidelity(ReplacementModel(adapter, transcoder), samples, **HOW)
        assert reports[name].to_dict() == alone.to_dict()
    assert reports[MEAN].ce_replacement.value == pytest.approx(reports["CLT"].ce_mean_ablated.value)
    assert reports[MEAN].loss_recovered.value == pytest.approx(0, abs=1e-6)


def test_all_layers_are_the_whole_replacement_and_fewer_are_more_faithful_here():
    adapter, samples = tiny_adapter("llama"), tiny_samples("llama")
    transcoder = plain_transcoder(adapter)
    counts = layer_counts(N_LAYERS)
    assert counts == [1, 2, 3]
    assert layer_counts(32) == [1, 5, 10, 14, 19, 23, 28, 32]
    assert layer_counts(32, first=2)[0] == 2
    reports = by_layers(adapter, transcoder, samples, counts, **HOW)
    whole = measure_fidelity(ReplacementModel(adapter, transcoder), samples, **HOW)
    assert reports[3].to_dict() == whole.to_dict()
    assert [report.n_layers_replaced for report in reports.values()] == counts


def test_kinds_split_all_positions():
    adapter, samples = tiny_adapter("llava"), tiny_samples("llava")
    replacement = ReplacementModel(adapter, plain_transcoder(adapter))
    report = measure_fidelity(replacement, samples, **HOW)
    inputs = adapter.prepare(samples)
    host, ours = (model.logits(inputs).double().log_softmax(-1) for model in (adapter, replacement))
    kl = (host.exp() * (host - ours)).sum(-1)
    assert set(report.at) == {"text", "image", "special"}
    for name, measures in report.at.items():
        here = inputs.is_token & (inputs.kind == TokenKind[name.upper()])
        assert measures["kl"].n == int(here.sum())
        assert measures["kl"].value == pytest.approx(float(kl[here].mean()), rel=1e-4)
        agree = (host.argmax(-1) == ours.argmax(-1))[here].double().mean()
        assert measures["top1"].value == pytest.approx(float(agree))


def test_the_command_writes_models_layers_and_a_figure(tmp_path, capsys):
    host = tmp_path / "host"
    from_config(TEXT_CONFIGS["llama"]()).save_pretrained(host)
    tiny_tokenizer().save_pretrained(host)
    for name, n_targets in (("clt", None), ("plt", 1)):
        config = CLTConfig(
            num_features=20, num_layers=N_LAYERS, d_model=WIDTH, activation_fn="relu", n_targets=n_targets
        )
        torch.manual_seed(0)
        CrossLayerTranscoder(config).save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("a b c d e f\nsome other words to go on with\n")
    command = [
        "fidelity",
        "--model",
        str(host),
        "--clt",
        f"CLT={tmp_path / 'clt'}",
        "--compare",
        f"PLT={tmp_path / 'plt'}",
    ]
    command += ["--by-layers", "--dataset", str(tmp_path / "text.txt"), "--prompt-words", "2", "--max-new-tokens", "3"]
    command_line.main([*command, "--output", str(tmp_path / "fidelity.json"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "fidelity.json").read_text())
    assert list(shown["models"]) == ["CLT", "PLT", MEAN]
    assert shown["kl"] == shown["models"]["CLT"]["kl"]
    assert {name: list(each) for name, each in shown["by_layers"].items()} == {
        n: ["1", "2", "3"] for n in ("CLT", "PLT")
    }
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        command_line.main([*command, "--compare", f"CLT={tmp_path / 'plt'}"])
    assert "Two transcoders are called 'CLT'" in capsys.readouterr().err


def test_a_folder_of_a_sweep_may_stand_with_and_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    swept = Path("runs") / "k=8_n=None"
    swept.mkdir(parents=True)
    options = Options(model="host", dataset="texts.jsonl", clt=f"CLT={swept}", compare=(str(swept), "runs/other"))
    assert named(options) == {"CLT": str(swept), "k=8_n=None": str(swept), "other": "runs/other"}
