"""nnsight reads the same values as plain hooks; without the package nothing begins."""

import importlib.util
from unittest.mock import patch

import pytest
import torch

from clt.activation_generation import ActivationGenerator
from clt.config import ActivationConfig
from clt.errors import ConfigError
from clt.lm.nnsight_backend import through_nnsight
from clt.nnsight import ActivationExtractorCLT
from tests.tiny_hosts import TEXT_CONFIGS, from_config, tiny_adapter, tiny_samples, tiny_tokenizer

needs_nnsight = pytest.mark.skipif(importlib.util.find_spec("nnsight") is None, reason="nnsight is not installed")


@needs_nnsight
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_values_are_those_of_plain_hooks(family):
    plain = tiny_adapter(family)
    inputs = plain.prepare(tiny_samples(family))
    expected, found = plain.capture(inputs), through_nnsight(plain).capture(inputs)
    for name in ("inputs", "targets", "kind", "sample", "position"):
        assert torch.equal(getattr(expected, name), getattr(found, name))


@needs_nnsight
def test_arguments_reach_nnsight():
    plain = tiny_adapter("gpt2")
    traced = through_nnsight(plain, {"marker": 1}, {"output_router_logits": None})
    stand_in = patch.object(type(traced._traced), "trace", side_effect=InterruptedError)
    with stand_in as trace, pytest.raises(InterruptedError):
        traced.capture(plain.prepare(tiny_samples("gpt2")))
    trace.assert_called_once_with(marker=1)


@needs_nnsight
def test_generation_through_nnsight_writes_the_same_rows(tmp_path):
    (tmp_path / "text.txt").write_text("some words to look at. " * 30)
    folders = []
    for backend in ("hooks", "nnsight"):
        config = ActivationConfig(
            model_name="tiny",
            dataset_path=str(tmp_path / "text.txt"),
            activation_dir=str(tmp_path / backend),
            context_size=16,
            held_out_fraction=0.0,
            backend=backend,
        )
        folders.append(ActivationGenerator(config, tiny_adapter("gpt2")).run())
    first, second = (next(folder.glob("shard_*")).read_bytes() for folder in folders)
    assert first == second


@pytest.mark.skipif(importlib.util.find_spec("nnsight") is not None, reason="nnsight is installed")
def test_without_the_package_nothing_begins(tmp_path):
    config = ActivationConfig(model_name="nowhere", dataset_path="nothing", backend="nnsight")
    with pytest.raises(ConfigError, match=r"pip install 'crosslayer\[nnsight\]'"):
        ActivationGenerator(config)


@pytest.mark.parametrize("text", ["{remote: true}", "[1]"])
def test_arguments_that_are_no_json_object_are_refused(text):
    with pytest.raises(ConfigError, match="--nnsight-tracer-kwargs-json"):
        ActivationConfig(model_name="m", dataset_path="d", nnsight_tracer_kwargs_json=text)


def test_the_seeds_dictionaries_are_read():
    values = {"model_name": "m", "dataset_path": "d", "nnsight_tracer_kwargs": {"scan": False}}
    assert ActivationConfig.from_dict(values).nnsight_tracer_kwargs == {"scan": False}


@pytest.mark.parametrize("backend", ["hooks", pytest.param("nnsight", marks=needs_nnsight)])
def test_the_extractor_streams_layers_of_tokens(tmp_path, backend):
    from_config(TEXT_CONFIGS["gpt2"]()).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text("some words to look at. " * 10)
    extractor = ActivationExtractorCLT(
        str(tmp_path / "gpt2"),
        mlp_input_module_path_template="transformer.h.{}.mlp.c_fc",
        mlp_output_module_path_template="transformer.h.{}.mlp.c_proj",
        device="cpu",
        context_size=16,
        inference_batch_size=4,
        backend=backend,
    )
    batches = list(extractor.stream_activations(str(tmp_path / "text.txt")))
    for inputs, targets in batches:
        assert list(inputs) == list(targets) == [0, 1, 2]
        assert inputs[0].shape == targets[2].shape
    assert sum(len(inputs[0]) for inputs, _ in batches) == 230
