"""Fidelity measured while training: the numbers of `clt fidelity`, and no change of the run."""

import json

import pytest
import torch
import tyro

import clt.__main__ as command_line
from clt.errors import ConfigError
from clt.models.checkpoint import read_tensors
from clt.replacement import ReplacementModel, measure_fidelity
from clt.replacement.probe import MEASURES, FidelityProbe
from clt.scripts import fidelity, sweep, train
from clt.training.trainer import CLTTrainer
from tests.interrupting import InterruptAt
from tests.tiny_data import store_of, write_data
from tests.tiny_hosts import tiny_adapter

TEXTS = [" ".join(f"word {number} and {other}" for other in range(8)) for number in range(5)]


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter("llama")


@pytest.fixture(scope="module")
def folder(adapter, tmp_path_factory):
    """A host, its (made-up) activations, and texts."""
    folder = tmp_path_factory.mktemp("fidelity")
    adapter.model.save_pretrained(folder / "host")
    adapter.tokenizer.save_pretrained(folder / "host")
    write_data(folder / "data", layers=adapter.n_layers, width=adapter.d_model)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def words(folder, output, *more, measures=True):
    given = [
        "--data", folder / "data", "--output-dir", output, "--num-features", 24, "--activation-fn", "jumprelu",
        "--training-steps", 10, "--train-batch-size-tokens", 64, "--device", "cpu", "--checkpoint-interval", 3,
        "--log-interval", 1, "--ema-decay", 0.9, *more,
    ]  # fmt: skip
    if measures:
        given += [
            "--fidelity-interval", 4, "--fidelity-dataset", folder / "texts.jsonl", "--fidelity-model", folder / "host",
            "--fidelity-samples", 4, "--fidelity-new-tokens", 3,
        ]  # fmt: skip
    return [str(each) for each in given]


def trainer_of(*given, **options):
    return train.open_trainer(tyro.cli(train.Options, args=words(*given, **options)))


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fidelity_of(run):
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith("fidelity/")}
        for line in lines_of(run)
        if "fidelity/kl" in line
    }


def test_every_few_steps_and_at_the_end_it_measures_what_clt_fidelity_does(folder, adapter, tmp_path):
    trainer = trainer_of(folder, tmp_path)
    model = trainer.train()
    measured = fidelity_of(tmp_path)
    assert sorted(measured) == [4, 8, 10]
    options = fidelity.Options(model="", clt="", dataset=str(folder / "texts.jsonl"), samples=4)
    samples = fidelity.held_out_samples(options, adapter)
    assert len(samples) == 4
    report = measure_fidelity(ReplacementModel(adapter, model), samples, max_new_tokens=3)
    for name in MEASURES:
        measure = getattr(report, name)
        if measure is not None:
            parts = [measured[10][f"fidelity/{name}{part}"] for part in ("", "/low", "/high", "/n")]
            assert parts == pytest.approx([measure.value, *measure.interval, measure.n], rel=1e-4, abs=1e-6), name


def test_measuring_changes_no_bit_of_the_run_stopped_or_not(folder, tmp_path):
    trainer_of(folder, tmp_path / "without", measures=False).train()
    trainer_of(folder, tmp_path / "with").train()
    stopped = trainer_of(folder, tmp_path / "stopped")
    stopped._extra_trackers = [InterruptAt(8)]
    with pytest.raises(InterruptedError):
        stopped.train()
    again = trainer_of(folder, tmp_path / "stopped")
    assert again.step == 6
    again.train()
    weights = [read_tensors(tmp_path / name / "clt.safetensors") for name in ("without", "with", "stopped")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
        assert torch.equal(value, weights[2][name]), name
    assert fidelity_of(tmp_path / "stopped") == fidelity_of(tmp_path / "with")
    assert [line["step"] for line in lines_of(tmp_path / "stopped")] == list(range(1, 11))


def test_a_run_may_begin_to_measure_when_it_goes_on(folder, tmp_path):
    first = trainer_of(folder, tmp_path / "run", measures=False)
    first._extra_trackers = [InterruptAt(5)]
    with pytest.raises(InterruptedError):
        first.train()
    command_line.main(["train", *words(folder, tmp_path / "run")])
    assert sorted(fidelity_of(tmp_path / "run")) == [4, 8, 10]


def test_random_numbers_of_the_run_are_left_alone(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path)
    before = torch.get_rng_state()
    trainer._measure_fidelity(lambda model: {"fidelity/noise": float(torch.rand(()))})
    assert torch.equal(torch.get_rng_state(), before)


def test_every_run_of_a_sweep_measures(folder, tmp_path, capsys):
    given = [*words(folder, tmp_path), "--held-out", str(folder / "data"), "--vary", "n_targets=None,1"]
    sweep.main(tyro.cli(sweep.Options, args=given))
    for name in ("n_targets=None", "n_targets=1"):
        assert sorted(fidelity_of(tmp_path / name)) == [4, 8, 10]


def refused(capsys, *given):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["train", *given])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_measured_is_refused_before_a_step(folder, tmp_path, capsys):
    run = tmp_path / "run"
    plain = words(folder, run, measures=False)
    assert "--fidelity-dataset FILE" in refused(capsys, *plain, "--fidelity-interval", "4")
    short = tmp_path / "short.txt"
    short.write_text("too short\n")
    given = [*plain, "--fidelity-interval", "4", "--fidelity-model", str(folder / "host"), "--fidelity-dataset"]
    assert "nowhere.jsonl" in refused(capsys, *given, str(tmp_path / "nowhere.jsonl"))
    assert "nothing is left to" in refused(capsys, *given, str(short))
    narrow = write_data(tmp_path / "narrow", layers=3, width=8)
    assert "d_model = 16, the transcoder 8" in refused(capsys, *words(folder, run), "--data", str(narrow))
    many = [*words(folder, run), "--activation-fn", "topk", "--topk-k", "4", "--topk-mode", "global"]
    assert "topk_mode = 'global'" in refused(capsys, *many)
    assert not run.exists()


def test_interval_and_measure_belong_together(folder, adapter, tmp_path):
    options = tyro.cli(train.Options, args=words(folder, tmp_path / "run"))
    store = store_of(folder / "data")
    config = train.fitted(options.clt, options.training, store)
    with pytest.raises(ConfigError, match="nothing was given to measure with"):
        CLTTrainer(config, options.training, tmp_path / "run", "cpu", store=store)
    probe = FidelityProbe(adapter, [], max_new_tokens=1)
    without = options.training.replace(fidelity_interval=None)
    with pytest.raises(ConfigError, match="does not say how often"):
        CLTTrainer(config, without, tmp_path / "run", "cpu", store=store, fidelity=probe)
    assert not (tmp_path / "run").exists()
