"""A checkpoint in parts is the same checkpoint: split, read anywhere, merged again bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models import CrossLayerTranscoder
from clt.models.checkpoint import save_tensors
from clt.models.slices import INDEX, Slices, merge, split
from clt.scripts import checkpoint

SHAPES = {
    "untied": {},
    "low rank": {"decoder_rank": 2},
    "pairs": {"decoder_tying": "per_source", "enable_feature_scale": True, "post_encoder": "pair"},
    "half": {"clt_dtype": "bfloat16", "skip_connection": True},
}


@pytest.fixture(params=SHAPES)
def folder(request, tmp_path):
    config = CLTConfig(num_features=11, num_layers=3, d_model=4, activation_fn="jumprelu", **SHAPES[request.param])
    model = CrossLayerTranscoder(config)
    model.save_pretrained(tmp_path / "whole")
    moments = {f"optimizer/{name}/exp_avg": torch.randn_like(value) for name, value in model.named_parameters()}
    steps = {f"optimizer/{name}/step": torch.tensor(7.0) for name, _ in model.named_parameters()}
    state = {"dead/silent_for": torch.arange(33).view(3, 11), "rng/torch": torch.get_rng_state()}
    save_tensors({**moments, **steps, **state}, tmp_path / "whole" / "trainer.safetensors")
    (tmp_path / "whole" / "trainer.json").write_text(json.dumps({"step": 7}))
    return tmp_path / "whole"


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_split_and_merged_is_the_same_bit_for_bit(folder, tmp_path, parts):
    split(folder, parts, tmp_path / "parts")
    assert Slices.open(tmp_path / "parts").n_parts == parts
    merge(tmp_path / "parts", tmp_path / "again")
    for file in ("clt.safetensors", "trainer.safetensors"):
        before, after = load_file(folder / file), load_file(tmp_path / "again" / file)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert after[name].dtype == value.dtype
            assert torch.equal(after[name], value), name
    CrossLayerTranscoder.from_pretrained(tmp_path / "again")


def test_rows_are_those_of_the_whole_wherever_the_cuts_are(folder, tmp_path):
    split(folder, 4, tmp_path / "parts")
    whole, parts = Slices.open(folder), Slices.open(tmp_path / "parts")
    for name, tensor in whole.tensors.items():
        if tensor.axis is not None:
            expected = whole.read(name).narrow(tensor.axis, 2, 7)
            assert torch.equal(parts.read(name, range(2, 9)), expected), name
            assert torch.equal(whole.read(name, range(2, 9)), expected), name


def test_a_missing_part_is_refused_by_name(folder, tmp_path):
    split(folder, 3, tmp_path / "parts")
    (tmp_path / "parts" / "part_0001_of_0003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part_0001_of_0003\.safetensors does not exist"):
        Slices.open(tmp_path / "parts")
    (tmp_path / "parts" / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Slices.open(tmp_path / "parts")


def test_parts_are_no_transcoder_until_they_are_merged(folder, tmp_path):
    split(folder, 2, tmp_path / "parts")
    with pytest.raises(CheckpointError, match="clt checkpoint merge"):
        CrossLayerTranscoder.from_pretrained(tmp_path / "parts")


def test_the_command_tells_splits_and_merges(folder, tmp_path, capsys):
    options = checkpoint.Options(action="split", folder=folder, out=tmp_path / "parts", parts=3)
    assert checkpoint.main(options)["parts"] == 3
    told = checkpoint.main(checkpoint.Options(action="info", folder=tmp_path / "parts"))
    assert (told["files"], told["step"], told["features"]) == (3, 7, 11)
    assert told["weights_bytes"] == sum(
        v.numel() * v.element_size() for v in load_file(folder / "clt.safetensors").values()
    )
    checkpoint.main(checkpoint.Options(action="merge", folder=tmp_path / "parts", out=tmp_path / "again"))
    assert "in one piece" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "parts")
    CrossLayerTranscoder.from_pretrained(tmp_path / "again")
