"""Doubling a feature with everything frozen moves pre-activations and logits by exactly what gradients predict."""

import pytest
import torch

from clt.errors import ConfigError, HostModelError
from clt.replacement import Intervention, SteeredHost, steered_logits
from clt.replacement.frozen import baseline_differences
from clt.replacement.passes import Passes
from tests.tiny_hosts import plain_transcoder, tiny_adapter, tiny_samples

FAMILIES = ["gpt2", "llama", "qwen3", "gemma3", "llava"]


def setup(family):
    adapter = tiny_adapter(family, dtype=torch.float64)
    steered = SteeredHost(adapter, plain_transcoder(adapter))
    return steered, adapter.prepare(tiny_samples(family)[1:2])


def close(ours, theirs):
    # Gemma's attention and norms compute in fp32 whatever the weights are in.
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-4, atol=2e-5)


def moved_along(steered, linear, difference, amount):
    """Pre-activations of every layer, and logits, with `amount` times the difference added to the MLP outputs."""
    encoder, reads = steered.transcoder.encoder, []

    def write(layer, x):
        reads.append(x[0])
        return (linear.writes[layer] + amount * difference[layer]).to(x)[None]

    final = linear.run(linear.embeddings[None], write)
    h = torch.stack([x.to(encoder) @ encoder[layer].T for layer, x in enumerate(reads)])
    return h, steered.adapter.model.get_output_embeddings()(final)


@pytest.mark.parametrize("family", FAMILIES)
def test_doubling_a_frozen_feature_moves_everything_by_the_predicted_amount(family):
    steered, inputs = setup(family)
    linear = steered.adapter.linearised(inputs)
    passes = Passes(steered.adapter, inputs)
    passes.begin(inputs.input_ids)
    host = steered_logits(steered, inputs, [], "direct")
    for layer, feature in ((0, 3), (1, 7)):
        act = Intervention(layer, feature, "scale", 2.0)
        with torch.no_grad():
            difference = baseline_differences(steered, steered.edit(act, passes), linear.reads)
            assert difference.abs().max() > 1e-3
            h_before, h_after = (moved_along(steered, linear, difference, amount)[0] for amount in (0.0, 1.0))
        moved = steered_logits(steered, inputs, act, "direct") - host
        amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for predicted, real in zip(moved_along(steered, linear, difference, amount), (h_after - h_before, moved)):
            weight = torch.randn(real.shape, dtype=torch.float64)
            slope = torch.autograd.grad((predicted * weight).sum(), amount, retain_graph=True)[0]
            close((real * weight).sum(), slope)
            assert real.abs().max() > 1e-4
        tripled = steered_logits(steered, inputs, Intervention(layer, feature, "scale", 3.0), "direct") - host
        close(tripled, 2 * moved)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llava"])
def test_each_mode_holds_what_it_says_and_nothing_is_steered_by_nothing(family):
    steered, inputs = setup(family)
    host = steered.adapter.logits(inputs)
    last = steered.adapter.n_layers - 1
    modes = [("free", None), ("iterative", None), ("direct", None), ("constrained", range(1, last + 1))]
    for mode, layers in modes:
        close(steered_logits(steered, inputs, [], mode, layers), host)
    act = Intervention(1, 7, "add", 4.0)
    free, iterative, direct, constrained = (steered_logits(steered, inputs, act, *each) for each in modes)
    close(free, steered.logits(inputs, interventions=act))
    assert min((a - b).abs().max() for a, b in ((free, iterative), (iterative, direct), (direct, constrained))) > 1e-3
    # In the last layer nothing is left to react but the final norm, which only `direct` holds.
    late = Intervention(last, 2, "add", 4.0)
    results = [steered_logits(steered, inputs, late, *each) for each in (*modes[:2], ("constrained", [last]))]
    for result in results[1:]:
        close(result, results[0])


def test_what_does_not_go_together_is_refused():
    steered, inputs = setup("llama")
    act = Intervention(0, 1, "ablate")
    for mode, layers in (("constrained", None), ("direct", [1])):
        with pytest.raises(ConfigError, match="the two go together"):
            steered_logits(steered, inputs, act, mode, layers)
    batch = steered.adapter.prepare(tiny_samples("llama"))
    for mode in ("direct", "iterative"):
        with pytest.raises(HostModelError, match=r"not o[nf] 3 rows"):
            steered_logits(steered, batch, act, mode)
