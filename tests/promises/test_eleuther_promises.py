"""`clt train --preset eleuther` takes EleutherAI's options as they write them."""

import json

import pytest

import clt.__main__ as command_line
from clt.models import CrossLayerTranscoder
from tests.tiny_data import write_data

OURS = ["--training-steps", "3", "--train-batch-size-tokens", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_data(tmp_path_factory.mktemp("data")))


def train(data, folder, *flags):
    preset = ["train", "--preset", "eleuther", "--data", data, "--output-dir", str(folder)]
    command_line.main([*preset, *OURS, *flags])
    return CrossLayerTranscoder.from_pretrained(folder).config


def test_their_flags_train_what_they_describe(data, tmp_path):
    flags = "--transcode --cross_layer=2 --k 4 --expansion_factor=3 --per_source_tied=True --train_post_encoder False"
    config = train(data, tmp_path, *flags.split())
    assert (config.num_features, config.d_model, config.num_layers) == (24, 8, 3)
    assert (config.span, config.decoder_tying, config.topk_k) == (2, "per_source", 4)
    assert (config.enable_feature_offset, config.ranking) == (False, "value")


def test_their_json_is_read_and_flags_go_before_it(data, tmp_path):
    theirs = {"activation": "topk", "k": 32, "num_latents": 40, "d_in": 8, "transcode": True, "cross_layer": 2}
    (tmp_path / "cfg.json").write_text(json.dumps(theirs))
    config = train(data, tmp_path / "run", "--theirs", str(tmp_path / "cfg.json"), "--k", "5", "--cross_layer", "0")
    assert (config.num_features, config.topk_k, config.span) == (40, 5, 1)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"d_in": 9}, "is for d_model = 9, but the activations have 8"),
        ({"latents": 9}, "no field 'latents'"),
        ({"topk_coalesced": True}, "anew for every target"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(data, tmp_path, capsys, theirs, message):
    (tmp_path / "cfg.json").write_text(json.dumps(theirs))
    with pytest.raises(SystemExit) as stopped:
        train(data, tmp_path / "run", f"--theirs={tmp_path / 'cfg.json'}", "--k", "4")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_and_an_unknown_preset_are_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(data, tmp_path, "--expansion", "3", "--no-such", "1")
    with pytest.raises(SystemExit):
        command_line.main(["train", "--preset", "elsewhere"])
    assert "no such preset of `clt train`. There is: `clt train --preset eleuther`" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["train", "--preset=eleuther", "--help"])
    assert stopped.value.code == 0
    assert "expansion-factor" in capsys.readouterr().out
