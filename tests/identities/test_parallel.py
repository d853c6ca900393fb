"""Many ranks take the steps that one takes: same losses, same kept features, same weights, on any table of ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clt.models import CrossLayerTranscoder
from tests.identities import parallel_driver as driver
from tests.tiny_data import write_data

ROOT = Path(__file__).resolve().parents[2]
MESHES = ("tp2dp1", "tp1dp2", "tp4dp1", "tp2dp2", "tp1dp4")
# The order of sums differs; everything else is the same.
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def drive(*arguments):
    command = [sys.executable, str(driver.__file__), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert answer.returncode == 0, answer.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every case on every table of ranks; each process is forked once per table."""
    folder = tmp_path_factory.mktemp("parallel")
    data = write_data(folder / "data")
    drive("train", data, folder, "tp1dp1", *MESHES)
    return folder


def numbers(folder):
    return json.loads((folder / "numbers.json").read_text())


@pytest.mark.parametrize("case", driver.CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_l0_norms_and_weights_are_those_of_one_rank(runs, mesh, case):
    one, many = runs / "tp1dp1" / case, runs / mesh / case
    lines = list(zip(numbers(one), numbers(many), strict=True))
    assert len(lines) == 12
    for expected, found in lines:
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert math.isclose(value, found[name], rel_tol=1e-6, abs_tol=1e-9), (expected["step"], name)
        assert found["l0"] == pytest.approx(expected["l0"], rel=1e-12), "the same number of kept features"
    whole, merged = (CrossLayerTranscoder.from_pretrained(folder) for folder in (one, many))
    assert whole.config == merged.config
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, **CLOSE, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("mesh", MESHES)
def test_bytes_told_are_those_of_the_formula(runs, mesh):
    for case, (counted, formula) in json.loads((runs / mesh / "traffic.json").read_text()).items():
        assert counted == formula, case


def test_saved_on_four_ranks_and_gone_on_with_on_any_number_equals_uninterrupted(runs, tmp_path):
    drive("resume", runs / "data", tmp_path, *("tp2dp2", "tp1dp1", "tp2dp1", "tp3dp1", "tp1dp3"))
    for case in driver.RESUMED:
        folders = [path / case for path in tmp_path.iterdir() if path.is_dir()]
        assert len(folders) == 4
        for folder in folders:
            assert_same_result(runs / "tp1dp1" / case, folder)
            assert [line["step"] for line in numbers(folder)] == list(range(6, 13))


def assert_same_result(one, other):
    whole, found = (CrossLayerTranscoder.from_pretrained(folder).state_dict() for folder in (one, other))
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("signal", {0: "KeyboardInterrupt", 1: "KeyboardInterrupt"}),
        ("silence", {0: "ParallelError", 1: "ParallelError"}),
        ("death", {0: "ParallelError"}),
    ],
)
def test_a_run_of_which_a_rank_is_stopped_ends_clearly_and_goes_on_exactly(runs, tmp_path, how, says):
    drive("stop", runs / "data", tmp_path, how)
    said = {rank: json.loads((tmp_path / f"said_{rank}.json").read_text()) for rank in says}
    assert {rank: each["type"] for rank, each in said.items()} == says
    if how == "signal":
        assert [each["step"] for each in said.values()] == [8, 8], "all stop after the same step"
    else:
        assert "Rank 0 lost its peers, rank 1 of group" in said[0]["text"]
        assert "--max-restarts" in said[0]["text"]
    assert_same_result(runs / "tp1dp1" / "topk", tmp_path)
    steps = [line["step"] for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert steps == list(range(1, 13)), "no step is missing, none comes twice"


def test_torchrun_starts_a_killed_run_again_and_it_ends_as_if_nothing_had_happened(runs, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    rest = ["--master-port", str(driver.free_port()), str(Path(driver.__file__).with_name("parallel_killed.py"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [*launch, *rest, str(runs / "data"), str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    assert (tmp_path / "killed").exists()
    assert_same_result(runs / "tp1dp1" / "batchtopk", tmp_path / "run")
    steps = [line["step"] for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())]
    assert steps == list(range(1, 13))
