"""The sparsity weight finds the L0 it is asked for."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.models import CrossLayerTranscoder
from clt.training.meet_l0 import factor_for_l0, scale_thresholds
from clt.training.schedules import steered
from clt.training.trainer import CLTTrainer
from tests.tiny_data import sparse_batch, store_of, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), tokens=4000)


def trainer_of(data, folder, target, fn="jumprelu", **changes):
    options = {
        "training_steps": 400, "train_batch_size_tokens": 128, "activation_path": str(data), "learning_rate": 1e-2,
        "sparsity_lambda": 0.005, "sparsity_c": 0.3, "sparsity_lambda_schedule": "constant",
    }  # fmt: skip
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn=fn, topk_k=4 if fn == "topk" else None)
    training = TrainingConfig(**{**options, "sparsity_target_l0": target, **changes})
    held_out = store_of(data).one_pass
    return CLTTrainer(config, training, folder, "cpu", held_out=held_out, shows_progress=False)


@pytest.mark.parametrize(("fn", "target"), [("relu", 2.0), ("jumprelu", 2.0), ("jumprelu", 3.0)])
def test_l0_comes_to_its_target(data, tmp_path, fn, target):
    # The weight is only ever raised, so it starts where L0 is above the target.
    trainer = trainer_of(data, tmp_path, target, fn, sparsity_lambda=0.01 / target)
    trainer.train()
    assert trainer.evaluate().l0 == pytest.approx(target, rel=0.15)
    assert trainer.progress.sparsity_factor > 1


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_thresholds_of_the_result_are_scaled_onto_the_target(data, tmp_path, ema_decay):
    # So few steps and so slow a rate that steering alone ends far from the target.
    options = {"training_steps": 40, "learning_rate": 3e-3, "ema_decay": ema_decay, "eval_batches": 99}
    trainers = [
        trainer_of(data, tmp_path / str(tokens), 3.0, **options, sparsity_target_tokens=tokens) for tokens in (0, 4000)
    ]
    left, met = (trainer.train() for trainer in trainers)
    last = json.loads((tmp_path / "4000" / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(trainers[0].evaluate().l0 - 3.0) > 0.2
    assert trainers[1].evaluate().l0 == pytest.approx(3.0, abs=0.05)
    assert last["held_out/l0"] == pytest.approx(trainers[1].evaluate().l0, rel=1e-5), "measured after it"
    assert last["calibration/l0_before"] == pytest.approx(trainers[0].evaluate().l0, abs=0.05)
    assert last["calibration/tokens"] >= 4000
    saved = CrossLayerTranscoder.from_pretrained(tmp_path / "4000")
    for name, value in left.state_dict().items():
        factor = last["calibration/factor"] if name.startswith("log_threshold") else None
        expected = value if factor is None else value + math.log(factor)
        torch.testing.assert_close(met.state_dict()[name], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(saved.state_dict()[name], met.state_dict()[name]), name


@given(target=st.floats(1.0, 8.0), seed=st.integers(0, 99))
def test_the_factor_is_the_one_at_which_so_many_are_on(target, seed):
    model = CrossLayerTranscoder(CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="jumprelu"))
    batches = [sparse_batch(tokens=300, seed=seed + number) for number in range(2)]
    with torch.no_grad():
        for layer, rows in enumerate(model.log_threshold):
            rows += torch.linspace(1.5, 2.5, 24) + layer / 10
    factor, counted = factor_for_l0(model, batches, target, n_tokens=600)
    scale_thresholds(model, factor)
    on = sum(int((model.encode(batch.inputs) > 0).sum()) for batch in batches) / (600 * 3)
    assert counted["calibration/tokens"] == 600
    assert on == pytest.approx(counted["calibration/l0_after"], abs=0.02)
    assert factor == 1 or on == pytest.approx(target, rel=0.11)
    if factor != 1 and 0.3 < factor < 3.5:
        assert on == pytest.approx(target, abs=0.05)


def test_a_target_out_of_reach_leaves_the_thresholds_alone():
    model = CrossLayerTranscoder(CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="jumprelu"))
    factor, counted = factor_for_l0(model, [sparse_batch()], 23.9, n_tokens=100)
    assert factor == 1.0
    assert counted["calibration/l0_after"] == counted["calibration/l0_before"] < 20


def test_the_factor_moves_against_the_miss_and_no_faster_than_its_limit():
    config = TrainingConfig(training_steps=100, sparsity_target_l0=10.0)
    assert steered(config, 2.0, 10.0, 5) == 2.0
    assert steered(config, 2.0, 11.0, 5) == pytest.approx(2.0 * math.exp(0.2 * math.log(1.1)))
    assert steered(config, 2.0, 1e9, 5) == pytest.approx(2.0 * math.exp(0.2))
    assert steered(config, 2.0, 0.0, 5) == pytest.approx(2.0 * math.exp(-0.2))
    assert steered(config, 1.1, 0.0, 5) == 1.0, "not below the schedule"
    assert steered(config.replace(sparsity_target_l0=None), 2.0, 1e9, 5) == 2.0
    annealed = config.replace(k_anneal_steps=10, k_anneal_start=3.0)
    assert steered(annealed, 2.0, 20.0, 5) == 2.0


@pytest.mark.parametrize(("fn", "weight"), [("topk", 0.1), ("jumprelu", 0.0)])
def test_a_target_without_a_penalty_is_refused(data, tmp_path, fn, weight):
    with pytest.raises(ConfigError, match="steers the sparsity penalty, but there is none"):
        trainer_of(data, tmp_path / "run", 4.0, fn, sparsity_lambda=weight)
    assert not (tmp_path / "run").exists()
