"""A sweep trains each configuration as if it were alone, on one read of the data."""

import json

import pytest
import torch
import tyro

from clt.config import CLTConfig
from clt.errors import ConfigError
from clt.models import CrossLayerTranscoder
from clt.scripts import sweep, train
from clt.training.setup import open_store
from clt.training.shared_store import SharedRead, SharedView
from clt.training.trainer import CLTTrainer
from tests.tiny_data import store_of, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "train")
    write_data(folder / "held_out", seed=7)
    return folder


def arguments(data, output, *vary):
    return [
        "--data", str(data), "--output-dir", str(output), "--num-features", "24", "--activation-fn", "topk",
        "--topk-k", "4", "--training-steps", "20", "--train-batch-size-tokens", "64", "--device", "cpu",
        "--checkpoint-interval", "5", "--vary", *vary,
    ]  # fmt: skip


def parse(*words):
    return tyro.cli(sweep.Options, args=list(words[0]))


def test_each_run_of_a_sweep_equals_the_run_alone(data, tmp_path, capsys):
    sweep.main(parse(arguments(data, tmp_path / "sweep", "topk_k=2,4", "n-targets=None,1")))
    results = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["name"] for row in results] == [
        f"topk_k={k}_n_targets={n}" for k in (2, 4) for n in (None, 1)
    ]  # fmt: skip
    assert {row["family"] for row in results} == {"CLT topk", "PLT topk"}
    assert (tmp_path / "sweep" / "frontier.png").stat().st_size > 1000
    alone = arguments(data, tmp_path / "alone")[:-1]
    train.main(tyro.cli(train.Options, args=[*alone, "--n-targets", "1"]))
    one, other = (
        CrossLayerTranscoder.from_pretrained(folder)
        for folder in (tmp_path / "alone", tmp_path / "sweep" / "topk_k=4_n_targets=1")
    )
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_data_are_read_once(data, tmp_path):
    training = parse(arguments(data, tmp_path, "topk_k=2,4")).run.training
    shared = SharedRead(open_store(training.replace(activation_path=str(data / "train"))))
    held_out = store_of(data / "held_out").one_pass
    trainers = [
        CLTTrainer(
            CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="topk", topk_k=k),
            training, tmp_path / str(k), "cpu", store=SharedView(shared), held_out=held_out, shows_progress=False,
        )
        for k in (2, 4, 6)
    ]  # fmt: skip
    shared.n_reads = 0
    sweep.train_together(trainers)
    assert shared.n_reads == 20


class InterruptAt:
    def log(self, step, values):
        if step == 10:
            raise KeyboardInterrupt

    def close(self):
        pass


def test_an_interrupted_sweep_goes_on(data, tmp_path, monkeypatch):
    sweep.main(parse(arguments(data, tmp_path / "whole", "topk_k=2,4")))
    real = CLTTrainer._open_trackers

    def with_interrupt(self):
        return [*real(self), InterruptAt()] if self.clt_config.topk_k == 4 else real(self)

    with monkeypatch.context() as patch:
        patch.setattr(CLTTrainer, "_open_trackers", with_interrupt)
        with pytest.raises(KeyboardInterrupt):
            sweep.main(parse(arguments(data, tmp_path / "broken", "topk_k=2,4")))
    sweep.main(parse(arguments(data, tmp_path / "broken", "topk_k=2,4")))
    for name in ("topk_k=2", "topk_k=4"):
        one, other = (CrossLayerTranscoder.from_pretrained(tmp_path / x / name) for x in ("whole", "broken"))
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("entry", ["no_such_option=1,2", "seed=1,2", "topk_k", "topk_k="])
def test_what_cannot_vary_is_refused(entry):
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        sweep.variants([entry])
