"""What a replacement model refuses, and that it leaves the host as it was."""

import pytest
import torch

from clt.errors import ConfigError, HostModelError
from clt.replacement import ReplacementModel
from tests.tiny_hosts import plain_transcoder, tiny_adapter, tiny_samples


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter("llama")


@pytest.mark.parametrize(
    ("name", "change", "ours", "theirs"), [("layers", {"num_layers": 4}, 3, 4), ("d_model", {"d_model": 8}, 16, 8)]
)
def test_a_transcoder_of_another_shape_is_refused_with_both_values(adapter, name, change, ours, theirs):
    transcoder = plain_transcoder(adapter)
    transcoder.config = transcoder.config.replace(**change, model_name="gpt2")
    with pytest.raises(HostModelError, match=rf"has {name} = {ours}, the transcoder {theirs}.*trained on gpt2"):
        ReplacementModel(adapter, transcoder)


def test_a_transcoder_that_read_elsewhere_is_refused_with_both_places(adapter):
    same = plain_transcoder(
        adapter, mlp_input_template="model.layers.{}.mlp", mlp_output_template="model.layers.{}.mlp"
    )
    ReplacementModel(adapter, same)
    other = plain_transcoder(adapter, mlp_input_template="model.layers.{}.post_attention_layernorm.input")
    with pytest.raises(
        HostModelError, match=r"layernorm.input, but the host's MLP input is taken at model.layers.{}.mlp"
    ):
        ReplacementModel(adapter, other)


def test_topk_over_all_layers_is_refused_with_the_way_out(adapter):
    transcoder = plain_transcoder(adapter, activation_fn="topk", topk_k=3, topk_mode="global")
    with pytest.raises(ConfigError, match="Convert it to JumpReLU first"):
        ReplacementModel(adapter, transcoder)


@pytest.mark.parametrize("n", [0, 4])
def test_a_number_of_layers_out_of_range_is_refused(adapter, n):
    with pytest.raises(ConfigError, match=f"first_n_layers = {n} must be between 1 and the host's 3 layers"):
        ReplacementModel(adapter, plain_transcoder(adapter), first_n_layers=n)


def test_errors_shorter_than_the_text_are_refused(adapter):
    replacement = ReplacementModel(adapter, plain_transcoder(adapter))
    inputs = adapter.prepare(tiny_samples("llama")[:1])
    errors = replacement.errors(inputs)
    with pytest.raises(
        HostModelError, match="The errors cover 5 positions, but the replacement model is at position 7"
    ):
        replacement.logits(inputs, errors=errors[:, :, :5])


def test_the_host_is_itself_again_afterwards(adapter):
    replacement = ReplacementModel(adapter, plain_transcoder(adapter))
    samples = tiny_samples("llama")
    inputs = adapter.prepare(samples)
    logits, text = adapter.logits(inputs), adapter.generate(samples, max_new_tokens=4)

    assert replacement.generate(samples, max_new_tokens=4) != text

    def fail(layer, features):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replacement.logits(inputs, interventions=fail)
    torch.testing.assert_close(adapter.logits(inputs), logits, rtol=0, atol=0)
    assert adapter.generate(samples, max_new_tokens=4) == text
