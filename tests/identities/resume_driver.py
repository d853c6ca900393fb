"""Trains in child processes that kill themselves (SIGKILL) at given moments, until one finishes.

Run as `python resume_driver.py DATA RUN FAMILY MOMENT...`; DATA is a folder, or `stream` for activations that are made
while training; FAMILY may end with ` async` (checkpoints are written beside the steps); a moment is `step:7` or
`write:2` (in the middle of the second checkpoint that this child writes). The last child has no moment. Only children
compute, so forking is safe.
"""

import os
import signal
import sys

import torch

from clt.config import CLTConfig, TrainingConfig
from clt.data.streaming import StreamingActivationStore
from clt.models.slices import TRAINER
from clt.training import checkpointing
from clt.training.trainer import CLTTrainer
from tests.tiny_data import sparse_batch, store_of

FAMILIES = {
    "jumprelu": {"activation_fn": "jumprelu"},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_k": 12},
}


class KillAt:
    """A tracker that kills the process at a step."""

    def __init__(self, step):
        self.at = step

    def log(self, step, values):
        if step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self):
        pass


def kill_in_write(number):
    """Kill the process half-way through its `number`th checkpoint: weights written, the trainer's state cut off."""
    written, save = [], checkpointing.save_tensors

    def save_half(tensors, path):
        written.extend([path] * (path.name == TRAINER))
        save(tensors, path)
        if path.name == TRAINER and len(written) == number:
            path.write_bytes(path.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)

    checkpointing.save_tensors = save_half


def source(epoch):
    """Some batches of different sizes, as a host would make them; other ones each epoch."""
    for number in range(4):
        yield sparse_batch(tokens=90 + 10 * number, seed=10 * epoch + number)


def stream():
    """A stream that begins its source again several times within a run."""
    return StreamingActivationStore(source, batch_size_tokens=64, buffer_tokens=200, statistics_tokens=300)


def trainer_of(data, run, family, moment="step:-1"):
    kind, number = moment.split(":")
    family, _, saving = family.partition(" ")
    if kind == "write":
        kill_in_write(int(number))
    training = TrainingConfig(
        training_steps=20,
        train_batch_size_tokens=64,
        micro_batch_tokens=32,
        activation_path=None if data == "stream" else data,
        log_interval=1,
        eval_interval=5,
        checkpoint_interval=3,
        async_save=saving == "async",
        dead_feature_window=100,
        learning_rate=1e-2,
        ema_decay=0.9,
        sparsity_target_l0=4.0 if family == "jumprelu" else None,
    )
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, **FAMILIES[family])
    trackers = [KillAt(int(number))] if kind == "step" else []
    if data == "stream":
        parts = {"store": stream(), "held_out": lambda: source(99)}
    else:
        parts = {"held_out": store_of(data).one_pass}
    return CLTTrainer(config, training, run, "cpu", trackers=trackers, **parts)


def in_child(data, run, family, moment):
    """The signal that ended the child, 0 if it finished."""
    child = os.fork()
    if child == 0:
        trainer_of(data, run, family, moment).train()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main(data, run, family, *moments):
    torch.set_num_threads(1)
    for moment in moments:
        assert in_child(data, run, family, moment) == signal.SIGKILL, moment
    assert in_child(data, run, family, "step:-1") == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
