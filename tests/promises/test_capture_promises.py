"""The VLM seeds' capture and upload commands run as written; what is captured trains."""

import json

import pytest
import torch

from clt.data.layer_files import LayerFiles
from clt.data.vlm_datasets import MultimodalDataset, VLMActivationDataset
from clt.errors import DatasetError
from clt.lm import ModelAdapter
from clt.worlds import load
from tests.promises.commands import run_script, smaller, words
from tests.tiny_hosts import tiny_image

CAPTURE = r"""python scripts/capture_activations.py \
  --model llava-hf/llava-1.5-7b-hf \
  --dataset path/to/queries.json \
  --image_dir path/to/images \
  --output_dir ./my_activations \
  --n_targets 16
"""
AMBER = r"""python scripts/capture_activations.py \
  --model llava-hf/llava-1.5-7b-hf \
  --dataset /path/to/amber/queries.json \
  --image_dir /path/to/amber/images \
  --output_dir ./activations_clt_format \
  --n_targets 16  # 16 future layers
"""
QUERIES = ("What is here?", "Describe this image.", "What is here?")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to" / "images").mkdir(parents=True)
    records = []
    for number, query in enumerate(QUERIES):
        tiny_image(number).save(tmp_path / "path" / "to" / "images" / f"{number}.png")
        records.append({"id": number, "image": f"{number}.png", "query": query})
    (tmp_path / "path" / "to" / "queries.json").write_text(json.dumps(records))
    return tmp_path


@pytest.fixture(scope="module")
def host():
    return ModelAdapter.from_pretrained(load("shapes").host_path(), device="cpu")


def capture(monkeypatch, command=CAPTURE, *more, **values):
    values = {"dataset": "path/to/queries.json", "image_dir": "path/to/images", **values}
    run_script(monkeypatch, "capture_activations.py", [*smaller(words(command), model="world:shapes", **values), *more])


@pytest.mark.parametrize("command", [CAPTURE, AMBER])
def test_the_command_writes_every_target_that_exists_and_no_other(here, monkeypatch, host, command):
    capture(monkeypatch, command, "--seed-layout")
    (folder,) = [path for path in here.iterdir() if "activations" in path.name]
    layers = [f"L{layer}" for layer in range(host.n_layers - 1)]
    assert sorted(path.name for path in folder.iterdir()) == [*layers, "capture.json"]
    for layer in range(host.n_layers - 1):
        y = torch.load(folder / f"L{layer}" / "batch_0_y.pt", weights_only=True)
        assert set(y) == {"y", "targets", "n_targets"}
        assert y["n_targets"] == len(y["targets"]) == host.n_layers - 1 - layer
        assert all(target.any() for target in y["targets"])


def test_the_files_hold_what_the_host_computes_from_a_prompt_with_real_line_breaks(here, monkeypatch, host):
    capture(monkeypatch, CAPTURE, "--seed-layout", n_targets=1)
    from clt.activation_generation.corpus import placed_image

    sample = placed_image(MultimodalDataset("path/to/queries.json", "path/to/images")[1], host)
    assert "\\n" not in sample.prompt
    batch = host.capture(host.prepare([sample]))
    x = torch.load("my_activations/L0/batch_1_x.pt", weights_only=True)["x"]
    y = torch.load("my_activations/L0/batch_1_y.pt", weights_only=True)
    assert x.dtype == host.dtype
    assert torch.equal(x[0], batch.inputs[0])
    assert torch.equal(y["y"][0], batch.targets[1])
    assert len(y["targets"]) == 1


def test_a_batch_of_several_lengths_is_stored_without_padding(here, monkeypatch):
    capture(monkeypatch, CAPTURE, "--batch_size", "3")
    shapes = [tuple(x.shape[:2]) for x, _ in (VLMActivationDataset("my_activations", 0)[i] for i in (0, 1))]
    assert sorted(samples for samples, _ in shapes) == [1, 2]
    assert shapes[0][1] != shapes[1][1]
    assert not list(here.glob("my_activations/*/.*")), "no temporary file is left"


def test_captured_files_train(here, monkeypatch):
    capture(monkeypatch)
    (here / "config.yaml").write_text(
        "outputs: {activations_dir: my_activations, transcoders_dir: transcoders, logs_dir: logs}\n"
    )
    training = ["--config", "config.yaml", "--layer", "0", "--steps", "3", "--feature-dim", "8"]
    run_script(monkeypatch, "train_llava_transcoder_layer.py", training)
    saved = torch.load(here / "transcoders" / "transcoder_L0.pt", weights_only=True)
    assert saved["n_targets"] == LayerFiles(here / "my_activations" / "L0").read(0)[1].shape[2]


def test_max_samples_takes_the_first(here, monkeypatch):
    capture(monkeypatch, CAPTURE, "--max_samples", "2")
    assert len(LayerFiles(here / "my_activations" / "L0")) == 2


def test_a_missing_or_broken_image_stops_the_capture_and_is_named(here, monkeypatch, capsys):
    image = here / "path" / "to" / "images" / "1.png"
    image.write_bytes(image.read_bytes()[:60])
    for reason in ("cannot be read", "does not exist"):
        with pytest.raises(SystemExit):
            capture(monkeypatch, CAPTURE, output_dir=reason.replace(" ", "_"))
        message = capsys.readouterr().err
        assert "queries.json:1" in message
        assert "1.png" in message
        assert reason in message
        image.unlink(missing_ok=True)


@pytest.mark.parametrize("n_targets", [1, 2, 16])
def test_targets_are_stored_once_and_read_as_if_they_were_copied(here, monkeypatch, host, n_targets):
    capture(monkeypatch, n_targets=n_targets)
    capture(monkeypatch, CAPTURE, "--seed-layout", n_targets=n_targets, output_dir="copied")
    for layer in range(host.n_layers - 1):
        pairs = [VLMActivationDataset(folder, layer) for folder in ("my_activations", "copied")]
        assert len(pairs[0]) == len(pairs[1]) == len(QUERIES)
        for index in range(len(QUERIES)):
            for once, copied in zip(pairs[0][index], pairs[1][index], strict=True):
                assert torch.equal(once, copied)
    numbers = sum(torch.load(path)["data"].numel() for path in here.glob("my_activations/targets/*/*.pt"))
    inputs = sum(torch.load(path)["x"].numel() for path in here.glob("my_activations/L*/*_x.pt"))
    assert numbers == inputs, "one output for each of the layers 1 to last, as there are inputs of 0 to last but one"


@pytest.mark.parametrize("layout", [[], ["--seed-layout"]])
def test_an_interrupted_capture_goes_on_to_the_same_files(here, monkeypatch, layout):
    capture(monkeypatch, CAPTURE, *layout, output_dir="whole")
    for writes in (2, 9, 10):
        with monkeypatch.context() as patched:
            patched.setattr("clt.data.layer_files.replace_file", stopping_after(writes))
            with pytest.raises(SystemExit):
                capture(monkeypatch, CAPTURE, *layout)
    capture(monkeypatch, CAPTURE, *layout)
    found = {
        folder: {
            str(path.relative_to(folder)): path.read_bytes() for path in (here / folder).rglob("*") if path.is_file()
        }
        for folder in (here / "whole", here / "my_activations")
    }
    assert found[here / "whole"] == found[here / "my_activations"]


def stopping_after(writes):
    left = iter(range(writes))

    def replace(temporary, final):
        if next(left, None) is None:
            raise KeyboardInterrupt
        temporary.replace(final)

    return replace


def test_a_finished_capture_is_left_alone_and_another_is_not_mixed_with_it(here, monkeypatch, capsys):
    capture(monkeypatch)
    capture(monkeypatch)
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        capture(monkeypatch, n_targets=1)
    assert "n_targets: 16 there, 1 now" in capsys.readouterr().err
    (here / "my_activations" / "capture.json").unlink()
    with pytest.raises(SystemExit):
        capture(monkeypatch)
    assert "already holds a capture" in capsys.readouterr().err


def test_a_linked_target_that_is_missing_or_elsewhere_is_refused(here, monkeypatch):
    capture(monkeypatch)
    (here / "my_activations" / "targets" / "L1" / "batch_0.pt").unlink()
    with pytest.raises(DatasetError, match=r"batch_0.pt is missing"):
        VLMActivationDataset("my_activations", 0)[0]
    torch.save({"linked_targets": ["../../secret.pt"], "n_targets": 1}, "my_activations/L0/batch_1_y.pt")
    with pytest.raises(DatasetError, match="outside its capture"):
        VLMActivationDataset("my_activations", 0)[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not JSON"),
        ("[]", "JSON list"),
        ('[{"query": "x"}]', "names no image"),
        ('[{"image": "0.png"}]', "query"),
    ],
)
def test_odd_queries_are_refused_before_the_host_is_loaded(here, text, message):
    (here / "odd.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        MultimodalDataset("odd.json", "path/to/images")
