"""The hand-written step on many ranks takes the steps of autograd on one, in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.identities import explicit_ranks
from tests.tiny_data import write_data

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ("1x2", "1x3", "2x1", "2x2")


def drive(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(explicit_ranks.__file__), *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert answer.returncode == 0, answer.stderr[:4000]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("explicit")
    drive("steps", out, *SHAPES)
    return {shape: torch.load(out / f"{shape}.pt") for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", explicit_ranks.KINDS)
def test_hand_written_steps_on_ranks_are_those_of_autograd_on_one(found, kind, shape):
    torch.set_num_threads(1)
    cases = [case for case in found[shape] if case[0] == kind]
    assert bool(cases) == (shape.startswith("1x") or "relu" in kind)
    for _, options, route in cases:
        one, many = explicit_ranks.steps_of(kind, options, "plain"), found[shape][kind, options, route]
        assert many["route"] == route
        for before, after in zip(one["seen"], many["seen"], strict=True):
            assert torch.equal(before["fired"], after["fired"]), (options, route)
            torch.testing.assert_close(after["losses"], before["losses"], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(after["norm"], before["norm"], rtol=1e-9, atol=1e-12)
        for name, value in one["state"].items():
            torch.testing.assert_close(
                many["state"][name], value, rtol=1e-8, atol=1e-10, msg=f"{options} {route} {name}"
            )


def test_runs_in_fp32_take_one_route_on_all_ranks_go_on_with_it_and_tell_each_other_what_the_formula_says(tmp_path):
    drive("runs", write_data(tmp_path / "data"), tmp_path, "1x1", *SHAPES[1:])
    for kind in explicit_ranks.RUNS:
        one = [json.loads(line) for line in (tmp_path / "1x1" / kind / "metrics.jsonl").read_text().splitlines()]
        for shape in SHAPES[1:]:
            found = torch.load(tmp_path / shape / kind / "found.pt")
            assert all(len(set(routes)) == 1 for routes in found["routes"])
            by_hand = kind == "jumprelu" or shape.startswith("1x")
            assert (found["routes"][0][0] is not None) == by_hand
            counted, formula = found["traffic"]
            looks = counted.pop("batchtopk candidates", 0) - formula.pop("batchtopk candidates", 0)
            assert looks in range(0, 3 * 4 * 8 + 1, 8), "at most four more of each layer"
            assert counted == formula
            lines = [json.loads(line) for line in (tmp_path / shape / kind / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(1, 11))
            for before, after in zip(one, lines, strict=True):
                assert after["loss"] == pytest.approx(before["loss"], rel=1e-3), (kind, shape)
