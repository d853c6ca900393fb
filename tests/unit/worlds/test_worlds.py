"""The door to the worlds, and the command that trains their hosts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from clt import worlds
from clt.errors import WorldError
from clt.worlds import base
from clt.worlds.train import TrainShapes, TrainTwoHop, main, run


@pytest.mark.parametrize("name", list(worlds.WORLDS))
def test_a_world_knows_its_name(name):
    world = worlds.load(name)
    assert world.name == name
    assert world.summary


def test_an_unknown_world_is_refused_with_the_closest_name():
    with pytest.raises(WorldError, match=r"(?s)'two_hops'.*Did you mean 'two-hop'.*shapes, two-hop, features"):
        worlds.load("two_hops")


def test_a_name_like_no_world_is_refused_with_the_list_alone():
    with pytest.raises(WorldError, match="The worlds are: shapes, two-hop, features") as refused:
        worlds.load("imagenet")
    assert "Did you mean" not in str(refused.value)


def test_importing_the_worlds_imports_no_torch():
    code = "import sys, clt.worlds; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shipped_files_stay_below_eight_megabytes():
    files = [file for file in base.assets_path("").rglob("*") if file.is_file()]
    assert {file.parent.name for file in files} == {"shapes", "two-hop"}
    assert sum(file.stat().st_size for file in files) < 8_000_000


@pytest.mark.parametrize("name", ["shapes", "two-hop"])
def test_shipped_weights_are_stored_as_halves_and_readable_by_everyone(name):
    weights = worlds.load(name).host_path() / "model.safetensors"
    header_bytes = int.from_bytes(weights.read_bytes()[:8], "little")
    header = json.loads(weights.read_bytes()[8 : 8 + header_bytes])
    assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} == {"F16"}
    assert weights.stat().st_mode & 0o004


def test_missing_weights_are_refused_with_the_command_that_makes_them(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "assets_path", lambda world: tmp_path / world)
    with pytest.raises(WorldError, match=r"clt\.worlds\.train two-hop"):
        worlds.load("two-hop").host_path()


def test_an_unknown_split_is_refused():
    with pytest.raises(WorldError, match="train, held_out"):
        base.split_number("test")


def test_training_the_shapes_host_writes_a_folder_that_loads(tmp_path):
    folder = tmp_path / "host"
    options = TrainShapes(output=folder, threads=1)
    recipe = options.recipe.__class__(alignment_steps=3, steps=2, batch=4, alignment_batch=4, evaluation_samples=6)
    record = run(TrainShapes(recipe=recipe, output=folder, threads=1))

    assert json.loads((folder / "train.json").read_text())["held_out"] == record["held_out"]
    AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert str(model.dtype) == "torch.float32"


def test_training_the_two_hop_host_twice_gives_the_same_weights(tmp_path, capsys):
    for name in ("first", "second"):
        main(["two-hop", "--steps", "3", "--batch", "8", "--output", str(tmp_path / name)])
    assert '"world": "two-hop"' in capsys.readouterr().out

    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    AutoTokenizer.from_pretrained(tmp_path / "first")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "first").num_parameters() > 100_000


def test_default_output_is_inside_the_package():
    assert TrainTwoHop().output is None
    assert base.assets_path("two-hop").is_relative_to(Path(worlds.__file__).parent)
