"""What `clt plan` says about memory, time and ways out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.__main__ import main
from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.models import CrossLayerTranscoder
from clt.training.devices import GPUS, parse_cluster, this_machine
from clt.training.host_shapes import host_shape
from clt.training.memory import n_parameters, setup_bytes, step_memory
from clt.training.plan import Assumptions, plan_run
from clt.training.remedies import remedies

ROOT = Path(__file__).parents[3]
LLAVA = CLTConfig(num_features=32768, num_layers=32, d_model=4096)
TRAINING = TrainingConfig()


@pytest.mark.parametrize("window", [(0, None), (1, 2)])
@pytest.mark.parametrize(
    "family",
    [
        {"decoder_tying": "per_source", "enable_feature_offset": True, "activation_fn": "relu"},
        {"decoder_tying": "per_target", "enable_feature_scale": True, "enable_feature_offset": True},
        {"decoder_rank": 3},
        {"enable_feature_scale": True, "post_encoder": "pair", "skip_connection": "all"},
        {"skip_connection": "own"},
    ],
)
def test_parameters_of_every_family_are_counted(family, window):
    first, n = window
    config = CLTConfig(num_features=12, num_layers=4, d_model=5, first_target=first, n_targets=n, **family)
    assert n_parameters(config) == sum(p.numel() for p in CrossLayerTranscoder(config).parameters())


@given(
    features=st.integers(4, 64), layers=st.integers(1, 5), width=st.integers(1, 9), shards=st.sampled_from([1, 2, 4])
)
def test_parts_hold_all_features_and_copies_of_what_has_none(features, layers, width, shards):
    config = CLTConfig(num_features=features * shards, num_layers=layers, d_model=width)
    replicated = layers * width
    assert shards * (n_parameters(config, shards) - replicated) + replicated == n_parameters(config)


@pytest.mark.parametrize(
    ("size", "gflop"), [((4, 128, 1024, 1024), 10.2), ((12, 768, 3072, 1024), 1246), ((8, 512, 4096, 2048), 1066)]
)
def test_operations_of_a_dense_step_are_those_of_the_performance_page(size, gflop):
    layers, width, features, tokens = size
    config = CLTConfig(num_features=features, num_layers=layers, d_model=width)
    training = TrainingConfig(train_batch_size_tokens=tokens)
    assert plan_run(config, training, "1xH100").flops == pytest.approx(gflop * 1e9, rel=0.005)


def test_bytes_sent_are_those_of_rings():
    config = CLTConfig(num_features=1024, num_layers=4, d_model=64)
    found = plan_run(config, TrainingConfig(train_batch_size_tokens=512), "8xH100", tp=4, dp=2)
    assert found.sent["tp"] == 2 * 3 / 4 * (512 // 2) * 4 * 64 * 4
    assert found.sent["dp"] == 2 * 1 / 2 * n_parameters(config, 4) * 4
    alone = plan_run(config, TRAINING, "H100")
    assert alone.sent == {"tp": 0, "dp": 0}


def test_tensors_kept_by_topk_depend_on_k_and_those_of_jumprelu_on_features():
    def activations(**options):
        config = CLTConfig(num_features=16384, num_layers=8, d_model=64, **options)
        route = "sparse" if "topk_k" in options else "dense"
        return step_memory(config, TRAINING, 1024, route).activations

    assert activations(activation_fn="topk", topk_k=8) < activations(activation_fn="topk", topk_k=64)
    assert activations(activation_fn="topk", topk_k=64) < activations() / 5


def test_the_split_chosen_fits_and_none_that_fits_is_faster():
    config = CLTConfig(num_features=8192, num_layers=24, d_model=2048)
    chosen = plan_run(config, TRAINING, "8xA100")
    others = [plan_run(config, TRAINING, "8xA100", tp=tp) for tp in (1, 2, 4, 8)]
    assert chosen.fits
    assert any(not each.fits for each in others)
    assert chosen.time.total == min(each.time.total for each in others if each.fits)


def test_remedies_that_are_said_to_fit_do_and_the_window_is_the_widest():
    base = plan_run(LLAVA, TRAINING, "8xH100")
    assert not base.fits
    found = remedies(base)
    assert {each.plan.fits for each in found} == {True, False}
    assert [each.plan.fits for each in found] == sorted((each.plan.fits for each in found), reverse=True)
    assert all(each.plan.peak < base.peak for each in found)
    (window,) = [each.plan for each in found if each.flags.startswith("--n-targets")]
    n = window.clt.n_targets
    assert n is not None
    assert window.fits
    assert not plan_run(LLAVA.replace(n_targets=n + 1), TRAINING, "8xH100").fits
    (more,) = [each.plan for each in found if each.flags.startswith("--gpus")]
    assert more.cluster.size > 8


def test_where_no_single_change_is_enough_several_are_tried_together():
    base = plan_run(LLAVA, TRAINING, "1xRTX4090")
    together = [each for each in remedies(base) if each.flags.count("--") > 3]
    assert together
    assert min(each.plan.peak for each in together) < base.peak / 4


def test_every_device_is_found_by_its_name_and_machines_multiply():
    assert {parse_cluster(f"2x{device.name}").device for device in GPUS.values()} == set(GPUS.values())
    cluster = parse_cluster("4x8xh100")
    assert (cluster.nodes, cluster.per_node, cluster.size, str(cluster)) == (4, 8, 32, "4x8xH100")
    assert parse_cluster("2xcpu").device.memory == this_machine().memory // 2


@pytest.mark.parametrize("text", ["8xH1000", "x8", "", "0xH100", "8x8x8xH100", "H100x8"])
def test_a_cluster_that_is_none_is_refused_with_the_devices_there_are(text):
    with pytest.raises(ConfigError, match="Devices: B200"):
        parse_cluster(text)


def test_a_device_without_its_prefix_is_guessed():
    with pytest.raises(ConfigError, match=r"Did you mean RTX4090\?"):
        parse_cluster("1x4090")


def test_splits_that_leave_devices_idle_are_refused():
    with pytest.raises(ConfigError, match="parts times copies must be 8"):
        plan_run(LLAVA, TRAINING, "8xH100", tp=3)


def test_assumptions_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="--efficiency 1"):
        Assumptions(efficiency=1.5)


def test_dimensions_come_from_the_table_or_a_local_config(tmp_path):
    assert host_shape("llava-hf/llava-1.5-7b-hf") == host_shape("LLaVA-1.5-7b-hf") == (32, 4096)
    decoder = {"num_hidden_layers": 7, "hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 99, "text_config": decoder}))
    assert host_shape(str(tmp_path)) == (7, 48)
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 3, "n_embd": 12}))
    assert host_shape(str(tmp_path)) == (3, 12)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="Give --n-layers and --d-model"):
        host_shape(str(tmp_path))


def test_an_unknown_host_is_refused_with_its_neighbours():
    with pytest.raises(ConfigError, match="Did you mean"):
        host_shape("meta-llama/Llama-3.1-8")


def test_the_command_loads_no_torch():
    code = (
        "import sys; from clt.__main__ import main\n"
        "main(['plan', '--model', 'gpt2', '--features', '8192', '--gpus', '2xA100', '--json'])\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    result = json.loads(done.stdout)
    assert result["fits"]
    assert result["tp"] * result["dp"] == 2
    assert result["remedies"] == []
    assert sum(result["memory_bytes"].values()) == result["moments_bytes"]["step"]
    assert result["peak_bytes"] == max(result["moments_bytes"].values())


def test_the_report_says_whether_it_fits_and_what_to_change(capsys):
    main(["plan", "--model", "llava-hf/llava-1.5-7b-hf", "--features", "32768", "--gpus", "8xH100"])
    text = capsys.readouterr().out
    assert "75.16e9 parameters" in text
    assert "It does not fit: 1" in text
    for flag in ("--n-targets", "--decoder-tying per_source", "--gpus"):
        assert re.search(rf"fits +[\d.,]+ GB  {re.escape(flag)}", text), flag
    main(
        ["plan", "--n-layers", "4", "--d-model", "64", "--features", "1024", "--activation-fn", "topk", "--topk-k", "8"]
    )
    assert "It fits" in capsys.readouterr().out


def test_a_host_and_its_dimensions_are_not_both_given(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--model", "gpt2", "--n-layers", "4"])
    assert stopped.value.code == 2
    assert "clt plan needs --model, or else both" in capsys.readouterr().err


def test_setup_is_a_peak_of_its_own_where_dictionaries_are_small_and_wide():
    config = CLTConfig(num_features=65536, num_layers=2, d_model=8, activation_fn="topk", topk_k=4)
    found = plan_run(config, TrainingConfig(train_batch_size_tokens=64), "1xH100")
    assert found.peak == setup_bytes(config) > found.memory.total


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_a_run_takes_about_what_the_plan_says():
    command = [sys.executable, "benchmarks/plan.py", "--only", "topk, tied", "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    (run,) = json.loads(done.stdout)["runs"]
    for moment in ("setup", "step", "evaluation"):
        assert run["ratio"][moment] == pytest.approx(1, abs=0.3)


def test_parts_that_choose_together_take_autograds_step_and_others_the_hand_written_one():
    config = CLTConfig(num_features=1024, num_layers=4, d_model=64)
    topk = config.replace(activation_fn="topk", topk_k=1)
    for clt, parts, copies in ((config, "dense", "dense"), (topk, "plain", "sparse")):
        assert plan_run(clt, TRAINING, "2xH100", tp=2).route == parts
        assert plan_run(clt, TRAINING, "2xH100", dp=2).route == copies
    assert plan_run(config, TrainingConfig(route="dense"), "2xH100", tp=2).refused is None
    assert plan_run(topk, TrainingConfig(route="dense"), "2xH100", tp=2).refused == "route = 'dense'"


@pytest.mark.parametrize("options", [{"optimizer": "adamw8bit"}, {"optimizer_in_backward": True}])
def test_what_several_devices_do_not_know_does_not_fit_them(options):
    config = CLTConfig(num_features=1024, num_layers=4, d_model=64)
    training = TrainingConfig(gradient_clip_val=None, **options)
    assert plan_run(config, training, "1xH100").fits
    several = plan_run(config, training, "2xH100")
    assert not several.fits
    (name,) = options
    assert (several.refused or "").startswith(f"{name} = ")
    assert all(each.plan.refused is None for each in remedies(several))
