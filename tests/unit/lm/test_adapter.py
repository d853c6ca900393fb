"""Reading, replacing and running a host."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from clt.errors import HostModelError
from clt.lm import ModelAdapter
from tests.tiny_hosts import MLP_PATHS, tiny_adapter, tiny_samples

FAMILIES = [*MLP_PATHS, "opt"]


def mlp_of(adapter, layer):
    """The host's MLP as a function, templates included."""
    pair = adapter._pairs[layer]
    if pair.is_whole_module:
        forward = type(pair.input.module).forward
        return lambda x: forward(pair.input.module, x)
    block = adapter.model.model.decoder.layers[layer]
    first, second = ((part.weight, part.bias) for part in (block.fc1, block.fc2))  # not the hooked modules
    return lambda x: linear(block.activation_fn(linear(x, *first)), *second)


def count_hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in module.__dict__)
        for module in model.modules()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_mlp_of_the_inputs(family):
    adapter = tiny_adapter(family)
    batch = adapter.capture(adapter.prepare(tiny_samples(family)))
    for layer in range(adapter.n_layers):
        x = batch.inputs[layer][None]
        torch.testing.assert_close(batch.targets[layer], mlp_of(adapter, layer)(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_an_mlp_by_itself_changes_no_logit(family):
    adapter = tiny_adapter(family)
    inputs = adapter.prepare(tiny_samples(family))
    expected = adapter.logits(inputs)

    for _ in range(2):  # the second time without running the original
        with torch.no_grad(), adapter.replacing(lambda layer, x: mlp_of(adapter, layer)(x)):
            replaced = adapter.logits(inputs)
        torch.testing.assert_close(replaced, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batches_equal_single_rows(family):
    adapter = tiny_adapter(family)
    samples = tiny_samples(family)
    for side in ("left", "right"):
        inputs = adapter.prepare(samples, padding_side=side)
        logits, batch = adapter.logits(inputs), adapter.capture(inputs)
        for row, sample in enumerate(samples):
            alone = adapter.prepare([sample])
            torch.testing.assert_close(
                logits[row][inputs.is_token[row]], adapter.logits(alone)[0], rtol=1e-4, atol=1e-4
            )
            single = adapter.capture(alone)
            torch.testing.assert_close(batch.select(batch.sample == row).targets, single.targets, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_uncached_batched_and_single_generation_agree(family):
    adapter = tiny_adapter(family)
    samples = tiny_samples(family)
    cached = adapter.generate_ids(samples, max_new_tokens=6)
    for other in (
        adapter.generate_ids(samples, max_new_tokens=6, use_cache=False),
        adapter.generate_ids(samples, max_new_tokens=6, batch_size=1),
    ):
        assert [row.tolist() for row in other] == [row.tolist() for row in cached]


def test_generation_is_teacher_forced_argmax():
    adapter = tiny_adapter("llava")
    samples = tiny_samples("llava")
    answers = adapter.generate_ids(samples, max_new_tokens=5)
    inputs = adapter.prepare(samples, answers=answers)
    best = adapter.logits(inputs).argmax(-1)
    for row, answer in enumerate(answers):
        first = int(inputs.answer[row].nonzero()[0])
        assert best[row, first - 1 : first - 1 + len(answer)].tolist() == answer.tolist()


def test_generation_ignores_the_hosts_own_sampling_defaults():
    adapter = tiny_adapter("llama")
    samples = tiny_samples("llama")
    expected = adapter.generate(samples, max_new_tokens=8)
    adapter.model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=2.0)
    assert adapter.generate(samples, max_new_tokens=8) == expected
    assert adapter.model.generation_config.repetition_penalty == 2.0


def test_generation_stops_behind_the_end_token():
    adapter = tiny_adapter("llama")
    samples = tiny_samples("llama")
    long = adapter.generate_ids(samples, max_new_tokens=8)
    adapter.model.generation_config.eos_token_id = [int(long[0][2]), 1]
    short = adapter.generate_ids(samples, max_new_tokens=8)
    first = long[0].tolist().index(int(long[0][2]))
    assert short[0].tolist() == long[0][: first + 1].tolist()


def test_capture_leaves_padding_out_and_numbers_rows_as_asked():
    adapter = tiny_adapter("llama")
    inputs = adapter.prepare(tiny_samples("llama"), padding_side="left")
    batch = adapter.capture(inputs, sample_ids=torch.tensor([7, 8, 11]))
    lengths = inputs.attention_mask.sum(1).tolist()
    assert batch.sample.tolist() == [number for number, n in zip((7, 8, 11), lengths) for _ in range(n)]
    assert batch.position.tolist() == [position for n in lengths for position in range(n)]
    assert batch.kind.tolist() == inputs.kind[inputs.is_token].tolist()


def test_capturing_without_a_mask_keeps_the_hosts_shape():
    adapter = tiny_adapter("llama")
    inputs = adapter.prepare(tiny_samples("llama"))
    with adapter.capturing() as captured:
        adapter.logits(inputs)
    assert captured.inputs.shape == (adapter.n_layers, *inputs.input_ids.shape, adapter.d_model)
    torch.testing.assert_close(captured.targets[:, inputs.is_token], adapter.capture(inputs).targets)


def test_capturing_sees_the_replacement():
    adapter = tiny_adapter("llama")
    inputs = adapter.prepare(tiny_samples("llama"))
    with adapter.replacing(lambda layer, x: torch.full_like(x, layer)), adapter.capturing() as captured:
        adapter.logits(inputs)
    assert (captured.targets == torch.arange(3.0).view(3, 1, 1, 1)).all()


def test_only_the_chosen_layers_are_replaced():
    adapter = tiny_adapter("llama")
    inputs = adapter.prepare(tiny_samples("llama"))
    seen = []
    with adapter.replacing(lambda layer, x: seen.append(layer) or x, layers=[0, 2]):
        adapter.logits(inputs)
    assert seen == [0, 2]


class Routed(nn.Module):
    """A mixture of experts that returns its router's scores too."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp
        self.n_calls = 0

    def forward(self, x):
        self.n_calls += 1
        return self.mlp(x), x.sum(-1)


@pytest.mark.parametrize("output_template", [None, "model.layers.{}.mlp.mlp"])
def test_mlps_that_return_more_than_their_value_keep_the_rest(output_template):
    adapter = tiny_adapter("llama")
    model = adapter.model
    scores = []
    for block in model.model.layers:
        block.mlp = Routed(block.mlp)
        block.mlp.register_forward_hook(lambda module, args, output: scores.append(output[1]) or output)
        block.register_forward_pre_hook(lambda module, args: None)
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda module, args, output: output[0])
    adapter = ModelAdapter(model, tokenizer=adapter.tokenizer, output_template=output_template)
    inputs = adapter.prepare(tiny_samples("llama"))
    with adapter.replacing(lambda layer, x: torch.zeros_like(x)), adapter.capturing() as captured:
        adapter.logits(inputs)
    assert len(scores) == adapter.n_layers
    assert not captured.targets.any()


def test_a_replaced_module_does_not_run():
    adapter = tiny_adapter("llama")
    inputs = adapter.prepare(tiny_samples("llama"))
    runs = []
    for block in adapter.model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda *_: runs.append(1))
    with adapter.replacing(lambda layer, x: x):
        adapter.logits(inputs)
        runs.clear()  # the first pass learns what the module returns
        adapter.logits(inputs)
    assert not runs


def test_a_forward_set_on_the_instance_is_put_back():
    adapter = tiny_adapter("llama")
    mlp = adapter.model.model.layers[0].mlp
    mlp.forward = own = mlp.forward
    with adapter.replacing(lambda layer, x: x):
        assert mlp.forward is not own
    assert mlp.forward is own


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_hooks_are_gone_after_an_exception(family):
    adapter = tiny_adapter(family)
    inputs = adapter.prepare(tiny_samples(family))
    expected, before = adapter.logits(inputs), count_hooks(adapter.model)

    def fail(layer, x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), adapter.capturing(), adapter.replacing(fail):
        adapter.logits(inputs)

    assert count_hooks(adapter.model) == before
    torch.testing.assert_close(adapter.logits(inputs), expected, rtol=0, atol=0)


def test_reading_before_anything_ran_is_refused():
    with pytest.raises(HostModelError, match="Nothing was captured"), tiny_adapter("llama").capturing() as captured:
        assert captured.inputs


def test_an_output_that_comes_before_the_input_is_refused():
    plain = tiny_adapter("llama")
    adapter = ModelAdapter(
        plain.model,
        tokenizer=plain.tokenizer,
        input_template="model.layers.{}.mlp.output",
        output_template="model.layers.{}.post_attention_layernorm",
    )
    inputs = adapter.prepare(tiny_samples("llama"))
    with pytest.raises(HostModelError, match="ran before"), adapter.replacing(lambda layer, x: x):
        adapter.logits(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_host_keeps_its_type_whatever_the_prediction_has(dtype):
    adapter = tiny_adapter("llama", dtype=dtype)
    inputs = adapter.prepare(tiny_samples("llama"))
    with adapter.replacing(lambda layer, x: x.float()):
        assert adapter.logits(inputs).dtype == dtype
    assert adapter.capture(inputs).inputs.dtype == dtype
