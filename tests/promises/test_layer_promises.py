"""The phase guide's per-layer training: its commands run, and its files have the reference's keys."""

import json
import os
import subprocess
import sys

import pytest
import torch

from clt.data.layer_files import LayerFiles
from clt.errors import CheckpointError, DatasetError
from clt.training.layer_transcoder import LayerTranscoder, load_layer_transcoder
from tests.promises.commands import SCRIPTS, run_script, smaller, words

COMMAND = r"""python train/train_llava_transcoder_layer.py \
  --config config/transcoder_llava15_7b.yaml \
  --layer 10 \
  --steps 5000 \
  --lr 3e-4 \
  --feature-dim 8192 \
  --batch-samples 16 \
  --cache-batches 800 \
  --val-interval 200 \
  --val-samples 20 \
  --compile
"""
WIDTH, POSITIONS, TARGETS = 8, 12, 3


def write_layer(folder, files=6, samples=4, missing=1, seed=0):
    """The seed's format; the last `missing` targets lie beyond the last layer and are zero."""
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(seed)
    maps = [torch.randn(WIDTH, WIDTH, generator=rng) for _ in range(TARGETS)]
    for number in range(files):
        x = torch.randn(samples, POSITIONS, WIDTH, generator=rng)
        targets = [x.relu() @ w for w in maps[: TARGETS - missing]] + [torch.zeros_like(x)] * missing
        targets = [target.bfloat16() for target in targets]
        torch.save({"x": x.bfloat16()}, folder / f"batch_{number}_x.pt")
        torch.save({"y": targets[0], "targets": targets, "n_targets": TARGETS}, folder / f"batch_{number}_y.pt")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # minutes on a CPU
    write_layer(tmp_path / "activations" / "L10")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "transcoder_llava15_7b.yaml").write_text(
        "feature_dim: 8192\nseq_len: 10\noutputs:\n  activations_dir: activations\n"
        "  transcoders_dir: transcoders\n  logs_dir: logs\n"
    )
    return tmp_path


def test_the_command_writes_the_seeds_files(here, monkeypatch):
    small = smaller(words(COMMAND), steps=300, lr=1e-2, feature_dim=32, val_interval=100)
    run_script(monkeypatch, "train_llava_transcoder_layer.py", small)
    saved = torch.load(here / "transcoders" / "transcoder_L10.pt")
    assert set(saved) == {
        "layer", "hidden_dim", "feature_dim", "n_targets", "state_dict", "training_metadata", "mlp_to_clt_mapping"
    }  # fmt: skip
    assert {k: tuple(v.shape) for k, v in saved["state_dict"].items()} == {
        "enc.0.weight": (8,), "enc.0.bias": (8,), "enc.1.weight": (32, 8), "enc.1.bias": (32,),
        "dec.weight": (24, 32), "dec.bias": (24,),
    }  # fmt: skip
    assert {"steps", "final_l0_pct", "dead_features", "dead_pct", "final_rec_loss"} <= saved["training_metadata"].keys()
    mapping = torch.load(here / "transcoders" / "mapping_L10.pt")
    assert mapping["mlp_to_clt_mapping"].shape == (8, 32)
    assert mapping["decoder_weights"].shape == (24, 32)
    metrics = json.loads((here / "logs" / "metrics_L10.json").read_text())
    assert [line["step"] for line in metrics["metrics"]] == [100, 200, 300]
    assert {"train_loss", "val_loss", "train_l0", "val_l0"} <= metrics["metrics"][0].keys()
    assert metrics["metrics"][-1]["val_nmse"] < 0.5
    assert (here / "logs" / "progress_L10.txt").exists()


def test_the_mapping_is_the_mean_size_of_the_next_output_where_a_feature_is_on(here, monkeypatch):
    small = smaller(words(COMMAND), steps=3, feature_dim=32)
    run_script(monkeypatch, "train_llava_transcoder_layer.py", small)
    model = load_layer_transcoder(here / "transcoders" / "transcoder_L10.pt")
    mapping = torch.load(here / "transcoders" / "mapping_L10.pt")["mlp_to_clt_mapping"]
    files = LayerFiles(here / "activations" / "L10")
    val = torch.randperm(6, generator=torch.Generator().manual_seed(0)).tolist()[0]
    pairs = [files.read(index) for index in range(6) if index != val]
    x, y = (torch.cat([pair[side] for pair in pairs]).flatten(0, 1).float() for side in (0, 1))
    on = model.encode(x) > 0
    expected = y[:, 0, 3].abs()[on[:, 5]].mean()
    torch.testing.assert_close(mapping[3, 5], expected)


def test_targets_beyond_the_last_layer_are_left_out(here, monkeypatch):
    small = smaller(words(COMMAND), steps=200, lr=1e-2, feature_dim=32)
    run_script(monkeypatch, "train_llava_transcoder_layer.py", small)
    weight = torch.load(here / "transcoders" / "transcoder_L10.pt")["state_dict"]["dec.weight"].unflatten(0, (3, 8))
    assert weight[2].abs().mean() < weight[:2].abs().mean(), "only weight decay has touched them"


def test_the_shell_script_trains_every_layer(here):
    write_layer(here / "activations" / "L2", seed=1)
    answer = subprocess.run(
        ["bash", str(SCRIPTS / "train_llava_clt.sh"), "llava-hf/llava-1.5-7b-hf", "my-first-clt", "./activations",
         "--steps", "2", "--feature-dim", "16"],
        capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(SCRIPTS.parent)},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    written = sorted(path.name for path in (here / "transcoders" / "my-first-clt").glob("transcoder*"))
    assert written == ["transcoder_L10.pt", "transcoder_L2.pt"]


def test_checkpoints_of_the_seed_are_read_compiled_and_without_n_targets(tmp_path):
    state = {f"_orig_mod.{k}": v.bfloat16() for k, v in LayerTranscoder(8, 16, 1).state_dict().items()}
    torch.save({"layer": 3, "hidden_dim": 8, "feature_dim": 16, "state_dict": state}, tmp_path / "transcoder_L3.pt")
    assert load_layer_transcoder(tmp_path / "transcoder_L3.pt").n_targets == 1
    (tmp_path / "half.pt").write_bytes((tmp_path / "transcoder_L3.pt").read_bytes()[:99])
    with pytest.raises(CheckpointError, match=r"half\.pt is no transcoder"):
        load_layer_transcoder(tmp_path / "half.pt")


def test_a_missing_or_odd_file_is_refused_by_name(tmp_path):
    with pytest.raises(DatasetError, match=r"holds no batch_\*_x"):
        LayerFiles(tmp_path)
    write_layer(tmp_path / "L0", files=2)
    (tmp_path / "L0" / "batch_1_y.pt").unlink()
    with pytest.raises(DatasetError, match=r"has no batch_1_y\.pt"):
        LayerFiles(tmp_path / "L0")


def test_single_target_and_four_dimensional_files_are_read(tmp_path):
    x = torch.randn(2, 1, 5, 8)
    torch.save({"data": x}, tmp_path / "batch_0_x.pt")
    torch.save({"y": x[:, 0]}, tmp_path / "batch_0_y.pt")
    inputs, targets = LayerFiles(tmp_path).read(0)
    assert (tuple(inputs.shape), tuple(targets.shape)) == ((2, 5, 8), (2, 5, 1, 8))
