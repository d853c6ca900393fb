"""The sparsity weight finds the L0 it is asked for."""

import math

import pytest

from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.training.schedules import steered
from clt.training.trainer import CLTTrainer
from tests.tiny_data import store_of, write_data


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
