"""A linearised host is the host, and affine in its embeddings and MLP outputs."""

import pytest
import torch
from torch import nn

from clt.errors import HostModelError
from clt.lm import ModelAdapter
from tests.attribution_hosts import host_and_inputs
from tests.tiny_hosts import TEXT_CONFIGS, tiny_adapter, tiny_samples

FAMILIES = [*TEXT_CONFIGS, "opt", "llava", "qwen2_5_vl"]
families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_values_are_the_hosts_own(family):
    adapter, inputs = host_and_inputs(family)
    linear = adapter.linearised(inputs, keep=[-2, -1])
    captured = adapter.capture(inputs)

    torch.testing.assert_close(linear.logits, adapter.logits(inputs)[0, -2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.reads, captured.inputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear.writes, captured.targets, rtol=1e-4, atol=1e-5)
    rows = linear.run(linear.embeddings.expand(3, -1, -1), lambda layer, x: linear.writes[layer].expand_as(x))
    torch.testing.assert_close(rows, linear.final.expand(3, -1, -1), rtol=1e-4, atol=1e-5)


@families
def test_run_is_affine_and_its_gradient_is_its_slope(family):
    adapter, inputs = host_and_inputs(family)
    linear = adapter.linearised(inputs)
    rng = torch.Generator().manual_seed(0)
    read = torch.randn(linear.final.shape, generator=rng)

    def final(embeddings, writes):
        reads = []
        out = linear.run(embeddings[None], lambda layer, x: reads.append(x) or writes[layer][None])
        return (out[0] * read).sum() + sum((x[0] * read).sum() for x in reads)

    embeddings, writes = linear.embeddings.clone().requires_grad_(), linear.writes.clone().requires_grad_()
    steps = torch.randn(embeddings.shape, generator=rng), torch.randn(writes.shape, generator=rng)
    here = final(embeddings, writes)
    slopes = torch.autograd.grad(here, (embeddings, writes))
    there = final(embeddings + steps[0], writes + steps[1])

    predicted = here + sum((slope * step).sum() for slope, step in zip(slopes, steps))
    torch.testing.assert_close(there, predicted, rtol=1e-4, atol=1e-3)


def test_the_host_is_itself_again_afterwards():
    adapter, inputs = host_and_inputs("llama")
    before, name = adapter.logits(inputs), adapter.model.config._attn_implementation
    linear = adapter.linearised(inputs)
    with pytest.raises(ZeroDivisionError):
        linear.run(linear.embeddings[None], lambda layer, x: 1 / 0)

    assert adapter.model.config._attn_implementation == name
    assert torch.equal(adapter.logits(inputs), before)
    assert all(parameter.requires_grad for parameter in adapter.model.parameters())


class Curved(nn.Module):
    """A stand-in for a block part that no held constant makes linear."""

    def forward(self, x):
        return nn.functional.gelu(x)


def test_a_host_that_stays_curved_is_refused_by_class_name():
    adapter = tiny_adapter("llama")
    adapter.model.model.layers[1].input_layernorm = Curved()
    linear = adapter.linearised(adapter.prepare(tiny_samples("llama")[:1]))

    with pytest.raises(HostModelError, match="Curved cannot be linearised"):
        linear.run(linear.embeddings[None].clone().requires_grad_(), lambda layer, x: linear.writes[layer].expand_as(x))


def test_padded_or_several_prompts_are_refused():
    adapter = tiny_adapter("llama")
    with pytest.raises(HostModelError, match="one prompt without padding"):
        adapter.linearised(adapter.prepare(tiny_samples("llama")))


@pytest.mark.parametrize(
    ("family", "read", "write"),
    [
        ("gpt2", "transformer.h.{}.ln_2.input", "transformer.h.{}.mlp.output"),
        ("llama", "model.layers.{}.post_attention_layernorm.input", "model.layers.{}.mlp.output"),
        (
            "gemma2",
            "model.layers.{}.pre_feedforward_layernorm.input",
            "model.layers.{}.post_feedforward_layernorm.output",
        ),
    ],
)
def test_names_of_transformerlens_are_found_in_the_host(family, read, write):
    model = tiny_adapter(family).model
    adapter = ModelAdapter(model, input_template="blocks.{}.hook_resid_mid", output_template="blocks.{}.hook_mlp_out")
    assert (adapter.input_template, adapter.output_template) == (read, write)
    with pytest.raises(HostModelError, match="hook_q"):
        ModelAdapter(model, input_template="blocks.{}.attn.hook_q", output_template="blocks.{}.hook_mlp_out")
