"""The demo in miniature: every stage on the real host, stopped and gone on with, its report self-contained."""

import json
import re
from dataclasses import replace

import pytest

from clt.errors import WorldError
from clt.scripts.demo import Options, pipeline


@pytest.fixture
def tiny(monkeypatch):
    amounts = replace(
        pipeline.QUICK, scenes=60, steps=20, batch_tokens=256, questions=12, descriptions=6, fidelity_samples=6
    )
    monkeypatch.setattr(pipeline, "QUICK", amounts)


def test_the_demo_measures_what_it_promises_and_goes_on_after_a_stop(tiny, tmp_path, monkeypatch, capsys):
    options = Options(output_dir=str(tmp_path), quick=True)
    stopped = pipeline.Demo(options)
    monkeypatch.setattr(stopped, "_replacement_of", lambda name: interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert not (tmp_path / "summary.json").exists()

    summary = pipeline.Demo(options).run()
    assert capsys.readouterr().out.count("already done") == 3  # host, activations, clt
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for name in ("clt", "plt"):
        promised = {
            "nmse", "l0_per_layer", "dead_share", "token_match", "kl", "top1", "features_per_layer", "train_seconds"
        }  # fmt: skip
        assert promised <= summary[name].keys()
        assert max(summary[name]["l0_per_layer"]) <= 16
    assert summary["clt"]["features_per_layer"] == 512
    assert summary["clt"]["parameters"] > summary["plt"]["parameters"]
    for scores in (summary["host"], summary["replacement"], summary["replacement"]["plt"]):
        assert scores["pope"]["n"] == 12
        assert scores["amber_like"]["n"] == 6
    assert set(summary["seconds"]) == {"host", "activations", "clt", "plt", "clt-replacement", "plt-replacement"}


def interrupt(_):
    raise KeyboardInterrupt


def test_the_report_needs_nothing_but_itself(tiny, tmp_path):
    pipeline.Demo(Options(output_dir=str(tmp_path), quick=True)).run()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6
    links = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert all(link.startswith("data:") for link in links)
    assert "<script" not in page


def test_a_stage_made_with_other_options_is_made_again(tiny, tmp_path, capsys, monkeypatch):
    pipeline.Demo(Options(output_dir=str(tmp_path), quick=True)).run()
    monkeypatch.setattr(pipeline, "QUICK", replace(pipeline.QUICK, steps=21))
    pipeline.Demo(Options(output_dir=str(tmp_path), quick=True)).run()
    assert "made with other options" in capsys.readouterr().out
    assert json.loads((tmp_path / "clt" / "run" / "run.json").read_text())["options"]["training"]["training_steps"] == 21


def test_a_world_that_does_not_exist_or_has_no_pictures_is_refused(tmp_path):
    with pytest.raises(WorldError, match="Did you mean 'shapes'"):
        pipeline.Demo(Options(output_dir=str(tmp_path), world="shape"))
    with pytest.raises(WorldError, match="vision-language host"):
        pipeline.Demo(Options(output_dir=str(tmp_path), world="two-hop"))
