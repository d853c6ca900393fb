"""Where the MLPs are: found by structure, or by templates."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from clt.errors import HostModelError
from clt.lm import ModelAdapter
from clt.types import Hookpoint
from tests.tiny_hosts import MLP_PATHS, N_LAYERS, OPT_TEMPLATES, opt_model, tiny_adapter, tiny_samples


@pytest.mark.parametrize("family", MLP_PATHS)
def test_mlps_of_every_family_are_found_by_structure(family):
    adapter = tiny_adapter(family)

    path = MLP_PATHS[family]
    assert adapter.hookpoints == tuple(
        Hookpoint(layer, f"{path.format(layer)}.input", f"{path.format(layer)}.output") for layer in range(N_LAYERS)
    )
    assert adapter.n_layers == N_LAYERS
    assert adapter.is_multimodal == (family == "llava")


def test_a_vision_tower_as_deep_as_the_decoder_is_not_taken_for_it():
    adapter = tiny_adapter("llava")

    assert adapter.model.config.vision_config.num_hidden_layers == adapter.n_layers
    assert "vision" not in adapter.input_template


@pytest.mark.parametrize(
    ("input_template", "output_template"),
    [
        ("transformer.h.{}.mlp", "transformer.h.{}.mlp"),
        ("transformer.h.{}.mlp.input", "transformer.h.{}.mlp.output"),
        ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
        ("transformer.h.{}.ln_2.output", "transformer.h.{}.mlp.dropout"),
        ("transformer.h.{}.mlp.c_fc.input", None),
        (None, "transformer.h.{}.mlp.dropout.input"),
    ],
)
def test_templates_that_name_the_same_values_capture_the_same(input_template, output_template):
    plain = tiny_adapter("gpt2")
    templated = ModelAdapter(
        plain.model, tokenizer=plain.tokenizer, input_template=input_template, output_template=output_template
    )
    inputs = plain.prepare(tiny_samples("gpt2"))

    expected, batch = plain.capture(inputs), templated.capture(inputs)

    torch.testing.assert_close(batch.inputs, expected.inputs, rtol=0, atol=0)
    torch.testing.assert_close(batch.targets, expected.targets, rtol=0, atol=0)


def test_the_residual_stream_before_the_norm_can_be_read():
    plain = tiny_adapter("gpt2")
    adapter = ModelAdapter(
        plain.model, tokenizer=plain.tokenizer, input_template="transformer.h.{}.ln_2.input", output_template=None
    )
    inputs = plain.prepare(tiny_samples("gpt2")[:1])

    batch = adapter.capture(inputs)

    states = plain.model(**inputs.tensors, output_hidden_states=True).hidden_states
    torch.testing.assert_close(batch.inputs[0] + batch.targets[0], states[1][0], rtol=1e-5, atol=1e-5)


def test_a_host_without_mlp_modules_is_refused_with_its_module_tree():
    with pytest.raises(HostModelError, match=r"(?s)OPTForCausalLM: looked for one list of 3 blocks.*fc1: Linear"):
        ModelAdapter(opt_model())


def test_a_host_without_mlp_modules_works_with_templates():
    adapter = ModelAdapter(opt_model(), **OPT_TEMPLATES)
    inputs = adapter.prepare_tokens(torch.randint(4, 200, (2, 5)))

    batch = adapter.capture(inputs)

    layer = adapter.model.model.decoder.layers[1]
    expected = layer.fc2(layer.activation_fn(layer.fc1(batch.inputs[1])))
    torch.testing.assert_close(batch.targets[1], expected)


def test_an_mlp_that_adds_the_residual_itself_is_refused():
    config = BloomConfig(vocab_size=20, hidden_size=8, n_layer=2, n_head=2)
    with pytest.raises(HostModelError, match="adds the residual stream to its own output"):
        ModelAdapter(AutoModelForCausalLM.from_config(config))


def test_a_template_that_names_no_module_is_refused_with_the_module_tree():
    model = tiny_adapter("llama").model
    with pytest.raises(HostModelError, match=r"(?s)no module 'model.layers.0.ffn'.*layers: 3 x LlamaDecoderLayer"):
        ModelAdapter(model, input_template="model.layers.{}.ffn", output_template="model.layers.{}.mlp")


def test_a_template_without_a_place_for_the_layer_is_refused():
    model = tiny_adapter("llama").model
    with pytest.raises(HostModelError, match=r"needs {} where the layer number goes"):
        ModelAdapter(model, input_template="model.layers.0.mlp")


def test_a_template_inside_the_mlp_is_refused_when_it_runs():
    plain = tiny_adapter("llama")
    adapter = ModelAdapter(plain.model, input_template="model.layers.{}.mlp.down_proj")
    inputs = adapter.prepare_tokens(torch.randint(4, 200, (1, 3)))
    with pytest.raises(HostModelError, match="carries 24 values per token, but the host's d_model is 16"):
        adapter.capture(inputs)
