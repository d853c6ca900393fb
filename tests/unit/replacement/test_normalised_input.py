"""Transcoders that read at TransformerLens' `ln2.hook_normalized`, before the norm's learned scale."""

import pytest
import torch
from torch import nn

from clt.config import CLTConfig
from clt.errors import HostModelError
from clt.lm.hook_names import norm_scale
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from tests.tiny_hosts import WIDTH, tiny_adapter, tiny_samples

TEMPLATE = "blocks.{}.ln2.hook_normalized"
NORMS = {"gpt2": "transformer.h.{}.ln_2", "llama": "model.layers.{}.post_attention_layernorm",
         "gemma2": "model.layers.{}.pre_feedforward_layernorm"}  # fmt: skip


def host(family):
    """With scales and biases that are not those of a fresh model."""
    adapter = tiny_adapter(family)
    rng = torch.Generator().manual_seed(1)
    for layer in range(adapter.n_layers):
        for weight in adapter.model.get_submodule(NORMS[family].format(layer)).parameters():
            weight.data.add_(0.3 * torch.randn(weight.shape, generator=rng))
    return adapter


def transcoder_of(adapter):
    torch.manual_seed(0)
    config = CLTConfig(
        num_layers=adapter.n_layers, num_features=24, d_model=adapter.d_model, activation_fn="relu",
        mlp_input_template=TEMPLATE,
    )  # fmt: skip
    transcoder = CrossLayerTranscoder(config)
    transcoder.input_shift.normal_(std=0.2)
    transcoder.input_scale.uniform_(0.5, 2)
    return transcoder


@pytest.mark.parametrize("family", NORMS)
def test_features_are_those_of_the_normalised_residual_stream(family):
    adapter = host(family)
    transcoder = transcoder_of(adapter)
    norm = adapter.model.get_submodule(NORMS[family].format(1))
    seen = []
    handle = norm.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    model = ReplacementModel.from_pretrained(adapter, transcoder)
    adapter.logits(adapter.prepare(tiny_samples(family)[:1]))
    handle.remove()
    x = seen[0].flatten(0, -2)
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = transcoder.encode_layer(1, x)
    scale, bias = norm_scale(adapter.model, 1)
    found = model.transcoder.encode_layer(1, x * scale + bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(norm(seen[0]).flatten(0, -2), x * scale + bias, rtol=1e-3, atol=1e-3)
    assert (expected > 0).any()


def test_what_the_user_gave_is_not_changed():
    adapter = host("llama")
    transcoder = transcoder_of(adapter)
    before = transcoder.input_scale.clone()
    model = ReplacementModel.from_pretrained(adapter, transcoder)
    assert torch.equal(transcoder.input_scale, before)
    assert transcoder.config.mlp_input_template == TEMPLATE
    assert model.transcoder.W_enc[0] is transcoder.W_enc[0]


def test_a_scale_of_zero_is_refused():
    adapter = host("llama")
    adapter.model.get_submodule(NORMS["llama"].format(2)).weight.data[3] = 0
    with pytest.raises(HostModelError, match=f"layer 2.*0 in 1 of {WIDTH}"):
        ReplacementModel.from_pretrained(adapter, transcoder_of(adapter))
