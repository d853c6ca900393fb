"""A run killed at any moment, also while it writes a checkpoint, ends bit for bit as if it had never been."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.config import CLTConfig, TrainingConfig
from clt.errors import CheckpointError, ConfigError
from clt.models.checkpoint import read_tensors
from clt.scripts import train
from clt.training.run_folder import step_of
from clt.training.trainer import CLTTrainer
from tests.interrupting import InterruptAt
from tests.tiny_data import store_of, write_data

DRIVER = Path(__file__).with_name("resume_driver.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def drive(data, run, family, *moments):
    root = str(DRIVER.parents[2])
    command = [sys.executable, str(DRIVER), str(data), str(run), family, *moments]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=root, env={"PYTHONPATH": root})
    assert answer.returncode == 0, answer.stderr[-2000:]


@pytest.mark.parametrize(
    ("family", "store"),
    [*itertools.product(["jumprelu", "batchtopk"], ["folder", "stream"]), ("batchtopk async", "folder")],
)
def test_a_run_killed_at_five_random_steps_and_in_two_writes_equals_an_uninterrupted_one(data, tmp_path, family, store):
    data = data if store == "folder" else "stream"
    drive(data, tmp_path / "whole", family.removesuffix(" async"))
    steps = sorted(random.Random(family).sample(range(2, 20), 5))
    moments = [f"step:{step}" for step in steps[:3]] + ["write:1", "write:2"] + [f"step:{step}" for step in steps[3:]]
    drive(data, tmp_path / "killed", family, *moments)

    whole, killed = (read_tensors(tmp_path / name / "clt.safetensors") for name in ("whole", "killed"))
    for name, value in whole.items():
        assert torch.equal(value, killed[name]), name
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*")), "leftovers are cleaned up"


def options_of(data, **changes):
    training = {
        "training_steps": 12,
        "train_batch_size_tokens": 64,
        "activation_path": str(data),
        "log_interval": 1,
        "checkpoint_interval": 1,
        "eval_interval": 4,
        "dead_feature_window": 100,
    }
    return TrainingConfig(**{**training, **changes})


def trainer_of(data, folder, resume_step=None, trackers=(), **changes):
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="topk", topk_k=4)
    held_out = store_of(data).one_pass
    training = options_of(data, **changes)
    return CLTTrainer(config, training, folder, "cpu", held_out=held_out, resume_step=resume_step, trackers=trackers)


def stop(trainer, after):
    trainer._extra_trackers = [InterruptAt(after + 1)]
    with pytest.raises(InterruptedError):
        trainer.train()


def steps_in(folder):
    return [step_of(path) for path in sorted((folder / "checkpoints").glob("step_*"))]


def test_the_newest_the_best_and_the_milestones_are_kept(data, tmp_path):
    trainer = trainer_of(data, tmp_path, milestone_interval=5, keep_checkpoints=2, learning_rate=1e-2)
    trainer.train()
    assert trainer.progress.best_step == 12
    assert steps_in(tmp_path) == [5, 8, 10, 11]  # 8: the best of those at which a checkpoint was written
    assert trainer.folder.record()["summary"]["best_held_out"] == {"step": 12, "nmse": trainer.progress.best_nmse}


def test_a_run_can_go_back_to_an_older_checkpoint(data, tmp_path):
    whole = trainer_of(data, tmp_path / "whole").train()
    stop(trainer_of(data, tmp_path / "run", keep_checkpoints=9), after=7)
    again = trainer_of(data, tmp_path / "run", resume_step=3, keep_checkpoints=9)
    assert again.step == 3
    assert steps_in(tmp_path / "run") == [1, 2, 3]
    for name, value in again.train().state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_a_step_without_checkpoint_is_refused_with_those_there_are(data, tmp_path):
    stop(trainer_of(data, tmp_path), after=3)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7\. Steps there: 2, 3"):
        trainer_of(data, tmp_path, resume_step=7)


def test_other_generators_do_not_matter(data, tmp_path):
    models = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        models.append(trainer_of(data, tmp_path / str(seed)).train())
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def options_for(data, folder):
    return train.Options(
        output_dir=str(folder),
        clt=CLTConfig(num_features=24, num_layers=9, d_model=1, activation_fn="topk", topk_k=4),
        training=options_of(data),
        device="cpu",
    )


@pytest.mark.parametrize("flag", ["--resume", "--resume_from_checkpoint_dir", "--resume-from-checkpoint-dir"])
def test_resume_needs_nothing_but_the_folder(data, tmp_path, flag):
    import tyro

    train.main(options_for(data, tmp_path / "whole"))
    stop(train.open_trainer(options_for(data, tmp_path / "run")), after=5)
    options = tyro.cli(train.Options, args=[flag, str(tmp_path / "run"), "--device", "cpu", "--resume_step", "4"])
    train.main(options)
    whole, resumed = (read_tensors(tmp_path / name / "clt.safetensors") for name in ("whole", "run"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_resume_takes_new_bookkeeping_and_refuses_other_science(data, tmp_path):
    stop(train.open_trainer(options_for(data, tmp_path)), after=2)
    other = train.Options(resume=str(tmp_path), training=TrainingConfig(keep_checkpoints=7))
    assert train.options_of_run(other).training.keep_checkpoints == 7
    assert train.options_of_run(other).training.training_steps == 12
    other = train.Options(resume=str(tmp_path), training=TrainingConfig(seed=7))
    with pytest.raises(ConfigError, match="seed: 42 there, 7 asked for now"):
        train.options_of_run(other)
    with pytest.raises(ConfigError, match=r"no run\.json"):
        train.options_of_run(train.Options(resume=str(tmp_path / "nowhere")))
