"""What docs/performance.md says about memory is what a process takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clt.config import CLTConfig, TrainingConfig
from clt.models import CrossLayerTranscoder
from clt.training.memory import n_parameters, step_memory

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("window", [(0, None), (1, 2)])
@pytest.mark.parametrize("fn", ["relu", "jumprelu"])
def test_parameters_are_counted(window, fn):
    config = CLTConfig(
        num_features=12, num_layers=4, d_model=5, first_target=window[0], n_targets=window[1], activation_fn=fn
    )
    assert n_parameters(config) == sum(p.numel() for p in CrossLayerTranscoder(config).parameters())


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("jumprelu", ["--route", "dense"]),
        ("jumprelu", ["--route", "dense", "--in-backward", "--recompute"]),
        ("topk", []),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_peak_memory_is_the_predicted_one(activation, options):
    size = ["--layers", "5", "--features", "5000", "--tokens", "1024", "--k", "16"]
    command = [sys.executable, "benchmarks/train_step.py", "--activation", activation, *size, *options]
    command += ["--threads", "1", "--repeats", "1", "--warm-up", "1", "--steps", "1", "--no-compares"]
    found = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment()).stdout
    )
    taken = found["peak_memory_gib"] - found["memory_before_gib"]
    said = found["predicted_memory_gib"] - found["memory_before_gib"]
    assert taken == pytest.approx(said, rel=0.25)


def environment():
    """glibc otherwise keeps freed blocks of this size (see docs/performance.md)."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "1000000"}


def test_what_saves_memory_is_predicted_to():
    config = CLTConfig(num_features=1000, num_layers=6, d_model=64)
    whole = step_memory(config, TrainingConfig(), 512, "dense").total
    assert step_memory(config, TrainingConfig(recompute_encoder=True), 512, "dense").total < whole
    streamed = TrainingConfig(optimizer_in_backward=True, gradient_clip_val=None)
    assert step_memory(config, streamed, 512, "dense").total < whole
