"""Identities of the replacement model, on tiny random hosts."""

import pytest
import torch

from clt.config import CLTConfig
from clt.lm import ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from clt.replacement import running as running_module
from tests.tiny_hosts import MLP_PATHS, PlainTranscoder, plain_transcoder, tiny_adapter, tiny_samples

FAMILIES = [*MLP_PATHS, "opt"]
WINDOWS = [{}, {"first_target": 1}, {"n_targets": 1}, {"n_targets": 2}]


# float64 leaves no room for excuses, but transformers' eager attention and grouped experts do not have it.
TOLERANCE = {"gemma2": 1e-4, "mixtral": 1e-4}


def replacement_of(family, **window):
    adapter = tiny_adapter(family, dtype=torch.float32 if family in TOLERANCE else torch.float64)
    return ReplacementModel(adapter, plain_transcoder(adapter, **window))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_replacement_plus_error_is_the_host(family, side):
    replacement = replacement_of(family)
    inputs = replacement.adapter.prepare(tiny_samples(family), padding_side=side)

    errors = replacement.errors(inputs)
    together = replacement.logits(inputs, errors=errors)

    host = replacement.adapter.logits(inputs)
    tolerance = TOLERANCE.get(family, 1e-6)
    torch.testing.assert_close(together[inputs.is_token], host[inputs.is_token], rtol=tolerance, atol=tolerance)
    assert (replacement.logits(inputs) - host).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_replacement_plus_error_is_the_host_token_by_token(family):
    replacement = replacement_of(family)
    adapter = replacement.adapter
    inputs = adapter.prepare(tiny_samples(family)[:1])
    host = adapter.logits(inputs)
    n_prompt, n = int((~inputs.answer).sum()), inputs.input_ids.shape[1]

    with torch.no_grad(), replacement.active(errors=replacement.errors(inputs)):
        first = {**inputs.tensors, "input_ids": inputs.input_ids[:, :n_prompt]}
        out = adapter.model(**{**first, "attention_mask": inputs.attention_mask[:, :n_prompt]}, use_cache=True)
        logits = [out.logits]
        for position in range(n_prompt, n):
            out = adapter.model(
                input_ids=inputs.input_ids[:, position : position + 1],
                attention_mask=inputs.attention_mask[:, : position + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            logits.append(out.logits)

    torch.testing.assert_close(torch.cat(logits, dim=1), host, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_all_sources_of_a_target_are_summed(window):
    replacement = replacement_of("llama", **window)
    inputs = replacement.adapter.prepare(tiny_samples("llama"), padding_side="right")

    with replacement.active(), replacement.adapter.capturing(inputs.is_token) as captured:
        replacement.adapter.logits(inputs)

    with torch.no_grad():
        expected = replacement.transcoder(captured.inputs)
    torch.testing.assert_close(captured.targets, expected)


def test_a_trained_kind_of_transcoder_runs_layer_by_layer_as_it_decodes():
    adapter = tiny_adapter("llava")
    for options in ({"activation_fn": "topk", "topk_k": 3}, {"activation_fn": "jumprelu"}, {"first_target": 1}):
        config = CLTConfig(num_features=20, num_layers=adapter.n_layers, d_model=adapter.d_model, **options)
        replacement = ReplacementModel(adapter, CrossLayerTranscoder(config))
        inputs = adapter.prepare(tiny_samples("llava"))
        with replacement.active(), adapter.capturing(inputs.is_token) as captured:
            adapter.logits(inputs)
        with torch.no_grad():
            expected = replacement.transcoder(captured.inputs)
        # Nothing writes to layer 0 if features write to later layers only; without a bias its MLP is left alone.
        assert replacement.layers == ((1, 2) if "first_target" in options else (0, 1, 2))
        for layer in replacement.layers:
            torch.testing.assert_close(captured.targets[layer], expected[layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_uncached_batched_and_single_generation_agree(family):
    replacement = replacement_of(family)
    samples = tiny_samples(family)
    cached = replacement.generate_ids(samples, max_new_tokens=6)
    for other in (
        replacement.generate_ids(samples, max_new_tokens=6, use_cache=False),
        replacement.generate_ids(samples, max_new_tokens=6, batch_size=1),
    ):
        assert [row.tolist() for row in other] == [row.tolist() for row in cached]
    host = replacement.adapter.generate_ids(samples, max_new_tokens=6)
    assert [row.tolist() for row in host] != [row.tolist() for row in cached]


@pytest.mark.parametrize("family", ["gpt2", "llava"])
def test_left_padded_batches_equal_single_rows(family):
    replacement = replacement_of(family)
    adapter, samples = replacement.adapter, tiny_samples(family)
    inputs = adapter.prepare(samples, padding_side="left")
    logits = replacement.logits(inputs)
    for row, sample in enumerate(samples):
        alone = replacement.logits(adapter.prepare([sample]))[0]
        torch.testing.assert_close(logits[row][inputs.is_token[row]], alone, rtol=1e-6, atol=1e-6)


def test_generation_is_teacher_forced_argmax():
    replacement = replacement_of("llava")
    samples = tiny_samples("llava")
    answers = replacement.generate_ids(samples, max_new_tokens=5)
    inputs = replacement.adapter.prepare(samples, answers=answers)
    best = replacement.logits(inputs).argmax(-1)
    for row, answer in enumerate(answers):
        first = int(inputs.answer[row].nonzero()[0])
        assert best[row, first - 1 : first - 1 + len(answer)].tolist() == answer.tolist()


def test_an_intervention_that_changes_nothing_changes_nothing(monkeypatch):
    replacement = replacement_of("llava")
    inputs = replacement.adapter.prepare(tiny_samples("llava"))
    expected = replacement.logits(inputs)
    shapes = set()

    def look(layer, features):
        shapes.add(features.shape)
        return features

    torch.testing.assert_close(replacement.logits(inputs, interventions=look), expected, rtol=0, atol=0)
    assert shapes == {(*inputs.input_ids.shape, 12)}
    monkeypatch.setattr(running_module, "NUMBERS_AT_ONCE", 7 * 48)
    torch.testing.assert_close(replacement.logits(inputs), expected)


def test_ablating_every_feature_leaves_the_biases():
    replacement = replacement_of("llama")
    inputs = replacement.adapter.prepare(tiny_samples("llama"))
    bias = replacement.transcoder.biases
    with torch.no_grad(), replacement.adapter.replacing(lambda layer, x: bias[layer].expand_as(x)):
        expected = replacement.adapter.logits(inputs)
    ablated = replacement.logits(inputs, interventions=lambda layer, features: torch.zeros_like(features))
    torch.testing.assert_close(ablated, expected)


def test_interventions_in_generation_equal_teacher_forced_ones():
    replacement = replacement_of("llava")
    samples = tiny_samples("llava")

    def double(layer, features):
        return features * 2 if layer == 1 else features

    answers = replacement.generate_ids(samples, max_new_tokens=5, interventions=double)
    inputs = replacement.adapter.prepare(samples, answers=answers)
    best = replacement.logits(inputs, interventions=double).argmax(-1)
    for row, answer in enumerate(answers):
        first = int(inputs.answer[row].nonzero()[0])
        assert best[row, first - 1 : first - 1 + len(answer)].tolist() == answer.tolist()


def test_replacing_the_first_layers_leaves_the_later_mlps_alone():
    adapter = tiny_adapter("llama", dtype=torch.float64)
    replacement = ReplacementModel(adapter, plain_transcoder(adapter), first_n_layers=2)
    inputs = adapter.prepare(tiny_samples("llama"))
    with replacement.active(), adapter.capturing(inputs.is_token) as captured:
        adapter.logits(inputs)
    with torch.no_grad():
        expected = replacement.transcoder(captured.inputs)
        last = type(adapter.model.model.layers[2].mlp).forward(adapter.model.model.layers[2].mlp, captured.inputs[2])
    torch.testing.assert_close(captured.targets[:2], expected[:2])
    torch.testing.assert_close(captured.targets[2], last)
    errors = replacement.errors(inputs)
    assert len(errors) == 2
    together = replacement.logits(inputs, errors=errors)
    torch.testing.assert_close(together, adapter.logits(inputs), rtol=1e-6, atol=1e-6)


def test_custom_hookpoints_replace_what_they_read():
    plain = tiny_adapter("gpt2", dtype=torch.float64)
    adapter = ModelAdapter(
        plain.model,
        tokenizer=plain.tokenizer,
        input_template="transformer.h.{}.ln_2.input",
        output_template="transformer.h.{}.mlp.output",
    )
    replacement = ReplacementModel(adapter, plain_transcoder(adapter))
    inputs = adapter.prepare(tiny_samples("gpt2"))
    together = replacement.logits(inputs, errors=replacement.errors(inputs))
    torch.testing.assert_close(together, adapter.logits(inputs), rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_transcoder_through_the_host():
    adapter = tiny_adapter("llama")
    config = CLTConfig(num_features=8, num_layers=3, d_model=adapter.d_model, activation_fn="relu")
    transcoder = PlainTranscoder(config)
    inputs = adapter.prepare(tiny_samples("llama"))
    with ReplacementModel(adapter, transcoder).active():
        adapter.model(**inputs.tensors).logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in transcoder.parameters())
