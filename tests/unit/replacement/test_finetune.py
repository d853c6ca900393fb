"""Fine-tuning through the replacement model lowers what it is asked to lower, and goes on exactly after a stop."""

import json

import pytest
import torch

import clt.__main__ as command_line
from clt.config import CLTConfig
from clt.data.streaming import StreamingActivationStore
from clt.errors import ConfigError, HostModelError, TrainingError
from clt.lm import ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.parallel.mesh import mesh_of_one
from clt.replacement import ReplacementModel
from clt.replacement.finetune import FinetuneConfig, Finetuner, end_to_end_loss
from clt.scripts.finetune import measure
from clt.training.setup import build_model
from clt.worlds import load

ROWS = 8
FAMILIES = {
    "jumprelu": {"activation_fn": "jumprelu", "jumprelu_threshold": 0.03},
    "topk": {"activation_fn": "topk", "topk_k": 16},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_k": 64},
}


@pytest.fixture(scope="module")
def world():
    return load("two-hop")


@pytest.fixture(scope="module")
def adapter(world):
    return ModelAdapter.from_pretrained(str(world.host_path()), device="cpu")


@pytest.fixture(scope="module")
def samples(world):
    return world.samples("train", 120)


def fresh(adapter, samples, family="topk"):
    """An untrained transcoder in place: everything is still to be learned."""
    config = CLTConfig(num_features=128, num_layers=adapter.n_layers, d_model=adapter.d_model, **FAMILIES[family])
    store = StreamingActivationStore(
        lambda epoch: iter([adapter.capture(adapter.prepare(samples[:64]))]),
        batch_size_tokens=256, buffer_tokens=256, statistics_tokens=256,
    )  # fmt: skip
    model = build_model(config, store, mesh_of_one("cpu"), seed=0)
    if family == "batchtopk":
        model.forward_training(next(store).inputs.float())
    return ReplacementModel(adapter, model)


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_lowers_the_held_out_loss(adapter, samples, tmp_path, family, loss):
    replacement = fresh(adapter, samples, family)
    before = measure(replacement, samples[100:], ROWS)
    config = FinetuneConfig(steps=30, rows=ROWS, learning_rate=3e-3, loss=loss)
    Finetuner(replacement, samples[:100], config, tmp_path).train()
    after = measure(replacement, samples[100:], ROWS)
    name = "kl" if loss == "kl" else "ce_replacement"
    assert after[name] < 0.7 * before[name]
    assert after["nmse"] < before["nmse"]
    saved = CrossLayerTranscoder.from_pretrained(tmp_path)
    for key, value in replacement.transcoder.state_dict().items():
        assert torch.equal(value, saved.state_dict()[key]), key
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 30


def test_the_host_does_not_change_and_gets_no_gradient(adapter, samples, tmp_path):
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    Finetuner(fresh(adapter, samples), samples, FinetuneConfig(steps=2, rows=ROWS), tmp_path).train()
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_a_stopped_run_goes_on_bit_for_bit(adapter, samples, tmp_path, monkeypatch):
    config = FinetuneConfig(steps=9, rows=ROWS, checkpoint_interval=2)
    whole = Finetuner(fresh(adapter, samples), samples, config, tmp_path / "whole").train()
    run = Finetuner(fresh(adapter, samples), samples, config, tmp_path / "run")
    real = run._one_step

    def stop_at_five():
        if run.step == 5:
            raise InterruptedError
        return real()

    monkeypatch.setattr(run, "_one_step", stop_at_five)
    with pytest.raises(InterruptedError):
        run.train()
    again = Finetuner(fresh(adapter, samples), samples, config, tmp_path / "run")
    assert again.step == 4
    for name, value in again.train().state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 10))


def test_every_sample_comes_once_per_epoch(adapter, samples, tmp_path):
    run = Finetuner(fresh(adapter, samples), samples[:24], FinetuneConfig(steps=1, rows=ROWS), tmp_path)
    epochs = [[sample.id for step in steps for sample in run.batch(step)] for steps in (range(3), range(3, 6))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(sample.id for sample in samples[:24])
    assert epochs[0] != epochs[1]


def test_the_losses_are_what_they_are_called():
    host, ours = torch.randn(2, 5, 7, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    following = torch.arange(5)
    p, q = host.softmax(1), ours.softmax(1)
    torch.testing.assert_close(end_to_end_loss("kl", host, ours, following), (p * (p / q).log()).sum(1).mean())
    torch.testing.assert_close(
        end_to_end_loss("ce", host, ours, following), -q[torch.arange(5), following].log().mean()
    )
    assert end_to_end_loss("kl", host, host, following).abs() < 1e-6


def test_what_cannot_be_trained_is_refused(adapter, samples, tmp_path):
    with pytest.raises(ConfigError, match="reconstruction_weight"):
        FinetuneConfig(reconstruction_weight=-1.0)
    with pytest.raises(HostModelError, match="no samples"):
        Finetuner(fresh(adapter, samples), [], FinetuneConfig(), tmp_path)
    broken = fresh(adapter, samples)
    with torch.no_grad():
        broken.transcoder.b_dec[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="Step 0: the loss or its gradient is not finite"):
        Finetuner(broken, samples, FinetuneConfig(rows=ROWS), tmp_path).train()


def test_the_command(adapter, samples, tmp_path, capsys):
    fresh(adapter, samples).transcoder.save_pretrained(tmp_path / "start")
    arguments = [
        "finetune", "--transcoder", tmp_path / "start", "--model", "world:two-hop", "--data", "world:two-hop",
        "--output", tmp_path / "out", "--samples", 64, "--held-out-samples", 16, "--steps", 6, "--rows", ROWS,
        "--device", "cpu",
    ]  # fmt: skip
    command_line.main([str(each) for each in arguments])
    assert "kl" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert report["after"]["kl"] < report["before"]["kl"]
    command_line.main([str(each) for each in arguments])
    assert "already holds this run, finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command_line.main([str(each) for each in [*arguments[:8], tmp_path / "start"]])
    assert "is the transcoder to start from" in capsys.readouterr().err
