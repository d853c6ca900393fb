"""What `clt train` and its neighbours refuse: one message, exit 2, and nothing on disk is touched."""

import hashlib
import json
import shutil

import pytest

import clt.__main__ as command_line
from clt.config import CLTConfig
from clt.models import CrossLayerTranscoder
from tests.tiny_data import write_data

TRAIN = "--training-steps 4 --train-batch-size-tokens 64 --num-features 24 --device cpu --activation-fn topk --topk-k 4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command_line.main([str(each) for each in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def train(data, folder, *flags):
    return "train", *TRAIN.split(), "--data", data, "--output-dir", folder, *flags


def test_more_features_kept_than_there_are(data, tmp_path, capsys):
    message = refused(capsys, *train(data, tmp_path / "run", "--topk-k", 25))
    assert "topk_k = 25 is more than the 24 features" in message
    assert not (tmp_path / "run").exists()


def test_data_that_are_not_there(tmp_path, capsys):
    assert "nowhere" in refused(capsys, *train(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_size_or_type_is_not_overwritten(data, tmp_path, capsys):
    run = tmp_path / "run"
    command_line.main([str(each) for each in train(data, run)])
    before = contents(run)
    wide = write_data(tmp_path / "wide", width=10)
    assert "d_model: 8 there, 10 asked for now" in refused(capsys, *train(wide, run))
    message = refused(capsys, *train(data, run, "--activation-dtype", "float16"))
    assert "'bfloat16' there, 'float16' asked for now" in message
    assert contents(run) == before


@pytest.mark.parametrize("sizes", [{"width": 10}, {"layers": 4}])
def test_held_out_data_of_another_host_are_refused_before_a_step(data, tmp_path, capsys, sizes):
    other = write_data(tmp_path / "other", **sizes)
    message = refused(capsys, *train(data, tmp_path / "run", "--held-out", other))
    assert (
        f"(layers, d_model) = ({sizes.get('layers', 3)}, {sizes.get('width', 8)}), those to train on (3, 8)" in message
    )
    assert not (tmp_path / "run").exists()


def test_held_out_data_without_a_token_or_of_another_width(data, tmp_path, capsys):
    run = tmp_path / "run"
    command_line.main([str(each) for each in train(data, run)])
    before = contents(run)
    assert "no-split" in refused(capsys, "evaluate", "--clt", run, "--data", tmp_path / "no-split")
    wide = write_data(tmp_path / "wide", width=10)
    assert "10" in refused(capsys, "evaluate", "--clt", run, "--data", wide)
    assert contents(run) == before


def test_a_configuration_with_an_unknown_key_and_half_a_checkpoint(data, tmp_path, capsys):
    model = CrossLayerTranscoder(CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="relu"))
    model.save_pretrained(tmp_path)
    config = tmp_path / "cfg.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "num_feature": 3}))
    assert "no field 'num_feature'" in refused(capsys, "evaluate", "--clt", tmp_path, "--data", data)
    config.write_text(json.dumps(values))
    weights = tmp_path / "clt.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "no whole safetensors file" in refused(capsys, "evaluate", "--clt", tmp_path, "--data", data)


@pytest.mark.parametrize("command", ["evaluate", "convert"])
def test_weights_of_another_type_than_the_configuration_says(data, tmp_path, capsys, command):
    options = {"num_features": 24, "num_layers": 3, "d_model": 8, "activation_fn": "topk", "topk_k": 4}
    CrossLayerTranscoder(CLTConfig(**options, clt_dtype="bfloat16")).save_pretrained(tmp_path)
    config = tmp_path / "cfg.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "clt_dtype": "float32"}))
    output = ("--output", tmp_path / "out") if command == "convert" else ()
    message = refused(capsys, command, "--clt", tmp_path, "--data", data, *output)
    assert "is bfloat16, but cfg.json (clt_dtype) says float32" in message
    assert not (tmp_path / "out").exists()


def test_a_folder_above_the_data_is_told_where_they_are(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "acts" / "host" / "texts" / "train")
    message = refused(capsys, *train(tmp_path / "acts", tmp_path / "run"))
    assert f"such as {tmp_path / 'acts' / 'host' / 'texts'}." in message
    assert f"such as {tmp_path / 'acts' / 'host' / 'texts'}." in refused(
        capsys, *train(tmp_path / "acts" / "host", tmp_path / "run")
    )


def test_a_transcoder_that_is_not_there_is_not_called_empty(tmp_path, capsys):
    assert "nowhere does not exist" in refused(capsys, "import", tmp_path / "nowhere", tmp_path / "run")
