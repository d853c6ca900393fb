"""Checkpoints written beside the training steps are those written between them, and no failure gets lost."""

import json
import os
import signal
import threading
import time

import pytest

from clt.config import CLTConfig, TrainingConfig
from clt.errors import CheckpointError
from clt.models.checkpoint import save_tensors
from clt.models.slices import STATE
from clt.training import checkpointing
from clt.training.trainer import CLTTrainer
from tests.tiny_data import store_of, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


class AtStep:
    """A tracker that does something at a step."""

    def __init__(self, step, work):
        self.at, self.work = step, work

    def log(self, step, values):
        if step == self.at:
            self.work()

    def close(self):
        pass


def trainer_of(data, folder, trackers=(), **changes):
    options = {"checkpoint_interval": 3, "async_save": True, "ema_decay": 0.9, "keep_checkpoints": 9, **changes}
    training = TrainingConfig(
        training_steps=12, train_batch_size_tokens=64, activation_path=str(data), log_interval=1, **options
    )
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="topk", topk_k=4)
    return CLTTrainer(config, training, folder, "cpu", store=store_of(data), trackers=trackers)


def checkpoints_in(folder):
    """The bytes of every file of every checkpoint, but for the seconds a run took."""
    found = {}
    for path in sorted((folder / "checkpoints").rglob("*")):
        if path.name == STATE:
            found[path.relative_to(folder)] = {**json.loads(path.read_text()), "seconds": None}
        elif path.is_file():
            found[path.relative_to(folder)] = path.read_bytes()
    return found


@pytest.mark.parametrize("optimizer", [{}, {"optimizer_state": "bf16"}])
def test_what_is_written_two_steps_later_is_what_there_was(data, tmp_path, monkeypatch, optimizer):
    trainer_of(data, tmp_path / "waits", async_save=False, **optimizer).train()
    goes_on = threading.Event()
    late = lambda tensors, path: (goes_on.wait(60), save_tensors(tensors, path))  # noqa: E731
    monkeypatch.setattr(checkpointing, "save_tensors", late)
    seen = []

    def look():
        seen.extend(path.name for path in (tmp_path / "async" / "checkpoints").iterdir())
        goes_on.set()

    trainer_of(data, tmp_path / "async", [AtStep(5, look)], **optimizer).train()
    assert seen == [".step_00000003.tmp"]
    first, second = (checkpoints_in(tmp_path / name) for name in ("waits", "async"))
    assert len(first) == 3 * 4
    assert first == second


def test_one_is_written_at_a_time(data, tmp_path, monkeypatch):
    at_once, most = [], []

    def slow(tensors, path):
        at_once.append(path)
        most.append(len(at_once))
        time.sleep(0.02)
        save_tensors(tensors, path)
        at_once.remove(path)

    monkeypatch.setattr(checkpointing, "save_tensors", slow)
    trainer_of(data, tmp_path, checkpoint_interval=1, keep_checkpoints=20).train()
    assert set(most) == {1}
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 11


@pytest.mark.parametrize("interval", [4, 11])
def test_a_full_disk_ends_the_run_with_its_error(data, tmp_path, monkeypatch, interval):
    trainer_of(data, tmp_path / "whole").train()
    written = []

    def full(tensors, path):
        written.append(path)
        if len(written) > (2 if interval == 4 else 0):
            time.sleep(0.2)
            raise CheckpointError(f"{path} could not be written")
        save_tensors(tensors, path)

    monkeypatch.setattr(checkpointing, "save_tensors", full)
    with pytest.raises(CheckpointError, match="could not be written"):
        trainer_of(data, tmp_path / "run", checkpoint_interval=interval).train()
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == (["step_00000004"] if interval == 4 else [])
    monkeypatch.undo()
    trainer_of(data, tmp_path / "run", checkpoint_interval=interval).train()
    results = [(tmp_path / name / "clt.safetensors").read_bytes() for name in ("whole", "run")]
    assert results[0] == results[1]


def test_another_error_does_not_hide_that_of_the_writer(data, tmp_path, monkeypatch):
    def full(tensors, path):
        raise CheckpointError("disk full")

    def fail():
        raise InterruptedError

    monkeypatch.setattr(checkpointing, "save_tensors", lambda *_: (time.sleep(0.3), full(*_)))
    with pytest.raises(CheckpointError, match="disk full") as raised:
        trainer_of(data, tmp_path, [AtStep(4, fail)]).train()
    assert isinstance(raised.value.__context__, InterruptedError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_what_is_being_written(data, tmp_path, monkeypatch, number):
    late = lambda tensors, path: (time.sleep(0.1), save_tensors(tensors, path))  # noqa: E731
    monkeypatch.setattr(checkpointing, "save_tensors", late)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(data, tmp_path, [AtStep(4, lambda: os.kill(os.getpid(), number))]).train()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000003", "step_00000004"]


def test_leaving_the_steps_early_keeps_what_was_being_written(data, tmp_path, monkeypatch):
    late = lambda tensors, path: (time.sleep(0.1), save_tensors(tensors, path))  # noqa: E731
    monkeypatch.setattr(checkpointing, "save_tensors", late)
    for step in trainer_of(data, tmp_path).steps():
        if step == 3:
            break
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_going_on_with_another_way_of_saving_is_no_other_run(data, tmp_path):
    trainer_of(data, tmp_path / "whole").train()
    for step in trainer_of(data, tmp_path / "run").steps():
        if step == 7:
            break
    again = trainer_of(data, tmp_path / "run", async_save=False)
    assert again.step == 6
    again.train()
    assert checkpoints_in(tmp_path / "whole") == checkpoints_in(tmp_path / "run")
