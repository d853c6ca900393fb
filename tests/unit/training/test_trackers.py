"""Every tracker gets the same numbers; a service whose package is missing is refused before any work is done."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.models import CrossLayerTranscoder
from clt.training.trackers import JSONLTracker, ProgressTracker
from clt.training.trainer import CLTTrainer
from tests.tiny_data import store_of, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def trainer_of(data, folder, **options):
    training = TrainingConfig(
        training_steps=4,
        train_batch_size_tokens=64,
        activation_path=str(data),
        log_interval=2,
        eval_interval=2,
        checkpoint_interval=1,
        **options,
    )
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="topk", topk_k=4)
    return CLTTrainer(config, training, folder, "cpu", held_out=store_of(data).one_pass)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class FakeService(ModuleType):
    """Stands for wandb or trackio: keeps what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.started, self.lines, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return SimpleNamespace(id=options.get("id") or "abc", log=self.log, finish=self.finish)

    def log(self, values, step):
        self.lines.append({"step": step, **values})

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    fake = FakeService(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


def test_a_service_gets_what_the_file_gets(data, tmp_path, service):
    name = service.__name__
    trainer_of(data, tmp_path / "run", **{f"enable_{name}": True, f"{name}_project": "mine"}).train()
    (started,) = service.started
    assert started["project"] == "mine"
    assert started["name"] == "run"
    assert started["config"]["training"]["training_steps"] == 4
    assert [line["step"] for line in service.lines] == [2, 4]
    for sent, written in zip(service.lines, lines_of(tmp_path / "run"), strict=True):
        assert sent == pytest.approx(written, rel=1e-5)
        assert "held_out/nmse" in sent
    assert service.finished == 1


def test_wandb_gets_the_seeds_names_and_the_same_run_again_on_resume(data, tmp_path, monkeypatch):
    fake = FakeService("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = {
        "enable_wandb": True,
        "wandb_entity": "us",
        "wandb_run_name": "first",
        "wandb_tags": ["a", "b"],
    }
    first = trainer_of(data, tmp_path, time_limit_minutes=1e-9, **options)
    with pytest.raises(Exception, match="Stopped at step 1"):
        first.train()
    trainer_of(data, tmp_path, **options).train()
    begun, resumed = fake.started
    assert (begun["entity"], begun["name"], begun["tags"], begun["id"]) == ("us", "first", ["a", "b"], None)
    assert resumed["id"] == "abc"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_service_is_refused_at_once(data, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=rf"(?s)enable_{name} = True needs {name}.*pip install 'crosslayer\[{name}\]'"
    ):
        trainer_of(data, tmp_path, **{f"enable_{name}": True})
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # wandb's own
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the wandb extra")
def test_wandb_works_offline(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer_of(data, tmp_path, enable_wandb=True).train()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    assert record.stat().st_size > 0


@pytest.mark.filterwarnings("ignore")  # trackio's own
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs the trackio extra")
def test_trackio_works_offline(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trainer_of(data, tmp_path / "run", enable_trackio=True).train()
    assert any((tmp_path / "trackio").iterdir())


def test_without_a_terminal_there_is_a_line_per_tenth(capsys):
    bar = ProgressTracker(total_steps=100, first_step=0)
    for step in range(1, 101):
        bar.log(step, {"loss": 1 / step, "tokens_per_second": 1000.0})
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "step 100 of 100: loss 0.01, tokens_per_second 1000"


def test_lines_after_the_resumed_step_are_dropped_and_half_lines_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    tracker = JSONLTracker(path, resume_step=1)
    tracker.log(2, {"loss": 1.5})
    tracker.close()
    assert lines_of(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_the_final_folder_loads_as_the_seeds_load_it(data, tmp_path):
    trained = trainer_of(data, tmp_path).train()
    loaded_config = CLTConfig.from_json(tmp_path / "final" / "cfg.json")
    loaded_model = CrossLayerTranscoder(loaded_config, process_group=None, device=torch.device("cpu"))
    loaded_model.load_state_dict(torch.load(tmp_path / "final" / "clt.pt", map_location="cpu"))
    batch = next(store_of(data).one_pass())
    assert torch.equal(loaded_model(batch.inputs.float()), trained(batch.inputs.float()))


def test_run_json_says_everything(data, tmp_path):
    trainer_of(data, tmp_path).train()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["finished"]
    assert {"crosslayer", "torch", "python"} <= record["versions"].keys()
    assert {"options", "data", "commit", "command", "summary"} <= record.keys()
    assert CLTConfig.from_dict(record["options"]["clt"]).num_features == 24
    assert TrainingConfig.from_dict(record["options"]["training"]).seed == 42
    assert record["summary"]["steps"] == 4
    assert record["summary"]["best_held_out"]["nmse"] > 0


def test_the_final_folder_can_be_left_out(data, tmp_path):
    trainer_of(data, tmp_path, write_final_folder=False).train()
    assert not (tmp_path / "final").exists()
