"""Opening hosts from disk, and every way it can fail."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig

from clt.errors import HostModelError
from clt.lm import ModelAdapter
from clt.types import Sample
from tests.tiny_hosts import llava_processor, tiny_adapter, tiny_samples

STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260K"


@pytest.fixture
def llama_folder(tmp_path):
    adapter = tiny_adapter("llama")
    adapter.model.save_pretrained(tmp_path / "host")
    adapter.tokenizer.save_pretrained(tmp_path / "host")
    return tmp_path / "host"


def test_a_saved_language_model_opens_as_it_was(llama_folder):
    original, adapter = tiny_adapter("llama"), ModelAdapter.from_pretrained(llama_folder, device="cpu")
    inputs = original.prepare(tiny_samples("llama"))
    torch.testing.assert_close(adapter.logits(inputs), original.logits(inputs))
    assert adapter.name == str(llama_folder)
    assert not adapter.is_multimodal
    assert not any(parameter.requires_grad for parameter in adapter.model.parameters())


def test_a_saved_vision_language_model_opens_with_its_processor(tmp_path):
    original = tiny_adapter("llava")
    original.model.save_pretrained(tmp_path)
    llava_processor().save_pretrained(tmp_path)
    adapter = ModelAdapter.from_pretrained(tmp_path, device="cpu")
    samples = tiny_samples("llava")
    assert adapter.is_multimodal
    assert adapter.generate(samples, max_new_tokens=4) == original.generate(samples, max_new_tokens=4)


def test_the_type_can_be_chosen(llama_folder):
    assert ModelAdapter.from_pretrained(llama_folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert ModelAdapter.from_pretrained(llama_folder, device="cpu").dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_opening_and_generating_print_nothing(family, tmp_path, capfd):
    adapter = tiny_adapter(family)
    adapter.model.save_pretrained(tmp_path)
    (adapter.processor or adapter.tokenizer).save_pretrained(tmp_path)
    capfd.readouterr()
    ModelAdapter.from_pretrained(tmp_path, device="cpu").generate(tiny_samples(family), max_new_tokens=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "some/deep/folder"])
def test_a_folder_that_does_not_exist_is_named(path):
    with pytest.raises(HostModelError, match=rf"(?s)host '{path}': there is no such folder"):
        ModelAdapter.from_pretrained(path)


@pytest.mark.parametrize("name", ["no-such/model", "gpt2-misspelt"])
def test_a_hub_id_that_cannot_be_had_offline_says_so(name):
    with pytest.raises(HostModelError, match=rf"(?s)host '{name}': it is no folder here.*local cache.*hf download"):
        ModelAdapter.from_pretrained(name)


def test_a_folder_without_a_model_lists_what_it_has(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(HostModelError, match=r"no readable configuration. It has: notes.txt"):
        ModelAdapter.from_pretrained(tmp_path)


def test_a_model_that_writes_no_text_is_refused(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(HostModelError, match="is a 'vit' model, which neither completes text"):
        ModelAdapter.from_pretrained(tmp_path)


def test_missing_weights_are_refused_instead_of_random(llama_folder):
    weights = load_file(llama_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HostModelError, match=r"lacks 1 of its weights, among them model.layers.1.mlp.up_proj.weight"):
        ModelAdapter.from_pretrained(llama_folder, device="cpu")


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_weights_that_were_cut_off_are_refused(llama_folder, keep):
    path = llama_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(HostModelError, match="Cannot open the weights"):
        ModelAdapter.from_pretrained(llama_folder, device="cpu")


def test_a_configuration_that_does_not_fit_the_weights_is_refused(llama_folder):
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(HostModelError, match="Cannot open the weights"):
        ModelAdapter.from_pretrained(llama_folder, device="cpu")


def test_an_image_host_without_its_processor_is_refused(tmp_path):
    adapter = tiny_adapter("llava")
    adapter.model.save_pretrained(tmp_path)
    adapter.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(HostModelError, match=r"(?s)Cannot open the processor .* holds no readable processor"):
        ModelAdapter.from_pretrained(tmp_path, device="cpu")


def test_a_folder_without_tokenizer_is_refused(llama_folder):
    for path in llama_folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(HostModelError, match="Cannot open the tokenizer"):
        ModelAdapter.from_pretrained(llama_folder, device="cpu")


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the stories260K model in {STORIES}")
def test_a_real_language_model_tells_a_story():
    adapter = ModelAdapter.from_pretrained(STORIES, device="cpu")
    [story] = adapter.generate([Sample(id="0", prompt="Once upon a time")], max_new_tokens=24)
    assert "there was a" in story
    assert adapter.capture(adapter.prepare([Sample(id="0", prompt=story)])).inputs.shape[::2] == (5, 64)
