"""What an intervention refuses, where it acts, and that acting while generating is acting on the finished text."""

import jaxtyping
import pytest
import torch

from clt.errors import ConfigError, HostModelError
from clt.replacement import Intervention, ReplacementModel, SteeredHost, SteeredNeurons, feature_std
from clt.types import Sample, TokenKind
from tests.tiny_hosts import plain_transcoder, tiny_adapter, tiny_samples


def steered(family, how, **options):
    adapter = tiny_adapter(family, dtype=torch.float64)
    if how == "neurons":
        return SteeredNeurons(adapter)
    transcoder = plain_transcoder(adapter)
    return (ReplacementModel if how == "replacement" else SteeredHost)(adapter, transcoder, **options)


def features_of(model, inputs, *interventions):
    """The features of every layer after the interventions, seen by a callable that comes last."""
    seen = {}

    def look(layer, features):
        seen[layer] = features.clone()
        return features

    model.logits(inputs, interventions=[*interventions, look])
    return seen


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"kind": "double", "value": 2.0}, "kind = 'double' is not one of 'scale'"),
        ({"kind": "scale"}, "'scale' needs a finite value, but got None"),
        ({"kind": "add", "value": float("nan")}, "'add' needs a finite value, but got nan"),
        ({"kind": "ablate", "value": 1.0}, "'ablate' takes no value"),
        ({"kind": "scale", "value": 2.0, "unit": "std"}, "'scale' has no unit"),
        ({"kind": "set", "value": 2.0, "unit": "sigma"}, "unit = 'sigma' is not one of 'absolute', 'std'"),
        ({"kind": "ablate", "positions": "answer"}, "positions = 'answer' is none of 'all', 'prompt', 'generated'"),
        ({"kind": "ablate", "positions": ()}, "no tuple of whole numbers"),
        ({"kind": "ablate", "positions": (1.5,)}, "no tuple of whole numbers"),
        ({"kind": "ablate", "layer": -1}, "numbered from 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(wrong, why, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without the tests' type checks
    with pytest.raises(ConfigError, match=why):
        Intervention(**{"layer": 1, "feature": 3, **wrong})


@pytest.mark.parametrize("how", ["replacement", "host", "neurons"])
def test_what_is_not_there_is_refused_with_what_is(how, monkeypatch):
    model = steered("llama", how)
    inputs = model.adapter.prepare(tiny_samples("llama"))
    what, many = ("neuron", 24) if how == "neurons" else ("feature", 12)
    for layer, feature, why in ((3, 0, "3 layers, 0 to 2"), (1, many, f"layer 1 has {many} {what}s, 0 to {many - 1}")):
        with pytest.raises(ConfigError, match=f"feature {layer}:{feature}: .*{why}"):
            model.logits(inputs, interventions=Intervention(layer, feature, "ablate"))
    with pytest.raises(HostModelError, match=r"'s0' has no position 11: its prompt has 4, and at most 7 are read"):
        model.logits(inputs, interventions=Intervention(0, 0, "ablate", positions=(0, 11)))
    with pytest.raises(HostModelError, match="no sample has image positions"):
        model.generate(
            tiny_samples("llama"), interventions=Intervention(0, 0, "ablate", positions="image"), max_new_tokens=2
        )
    with pytest.raises(ConfigError, match="in standard deviations, but those of the"):
        model.logits(inputs, interventions=Intervention(0, 0, "add", 1.0, unit="std"))
    with (
        pytest.raises(ConfigError, match="which positions those are is not known here"),
        model.active(interventions=Intervention(0, 0, "ablate", positions="last")),
    ):
        model.adapter.logits(inputs)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match="returned None at layer 0 instead of the features"):
        model.logits(inputs, interventions=lambda layer, features: None)


def test_positions_are_those_of_the_rows_whatever_the_padding():
    model = steered("llava", "replacement")
    samples = tiny_samples("llava")
    for side in ("left", "right"):
        inputs = model.adapter.prepare(samples, padding_side=side)
        seen = {}
        for positions in ("all", "prompt", "generated", "text", "image", "special", "last", (0, 2, -1)):
            one = Intervention(1, 4, "set", 1e6, positions=positions)
            seen[positions] = features_of(model, inputs, one)[1][..., 4] == 1e6
        prompt = inputs.is_token & ~inputs.answer
        n_prompt = prompt.sum(1)[:, None]
        expected = {
            "all": inputs.is_token,
            "prompt": prompt,
            "generated": inputs.answer,
            "text": inputs.is_token & (inputs.kind == TokenKind.TEXT),
            "image": inputs.kind == TokenKind.IMAGE,
            "special": inputs.is_token & (inputs.kind == TokenKind.SPECIAL),
            "last": prompt & (inputs.position == n_prompt - 1),
            (0, 2, -1): prompt & ((inputs.position == 0) | (inputs.position == 2) | (inputs.position == n_prompt - 1)),
        }
        for positions, where in expected.items():
            assert seen[positions].equal(where), positions
            assert where.any()


def test_each_kind_does_what_its_formula_says():
    model = steered("gpt2", "replacement")
    inputs = model.adapter.prepare(tiny_samples("gpt2"))
    model.feature_std = torch.rand(3, 12, dtype=torch.float64) + 0.5
    before = features_of(model, inputs)[0][inputs.is_token][:, 7]
    std = float(model.feature_std[0, 7])
    for one, expected in (
        (Intervention(0, 7, "scale", -2.0), before * -2),
        (Intervention(0, 7, "set", 0.7), torch.full_like(before, 0.7)),
        (Intervention(0, 7, "set", 2.0, unit="std"), torch.full_like(before, 2 * std)),
        (Intervention(0, 7, "add", 0.3), before + 0.3),
        (Intervention(0, 7, "add", -1.5, unit="std"), before - 1.5 * std),
        (Intervention(0, 7, "ablate"), torch.zeros_like(before)),
    ):
        after = features_of(model, inputs, one)[0]
        torch.testing.assert_close(after[inputs.is_token][:, 7], expected)
    several = [Intervention(0, 7, "add", 1.0), Intervention(0, 7, "scale", 3.0), Intervention(0, 2, "set", 5.0)]
    after = features_of(model, inputs, *several)[0][inputs.is_token]
    torch.testing.assert_close(after[:, 7], (before + 1) * 3)
    assert (after[:, 2] == 5).all()


def test_the_seeds_hook_changes_features_in_place():
    model = steered("llava", "replacement")
    inputs = model.adapter.prepare(tiny_samples("llava"))

    def intervention_hook(layer_idx, features):
        """Modify features during forward pass"""
        if layer_idx == 1:
            features[:, :, 5] *= 2.0
        return features

    torch.testing.assert_close(
        model.logits(inputs, interventions=intervention_hook),
        model.logits(inputs, interventions=Intervention(1, 5, "scale", 2.0)),
    )


@pytest.mark.parametrize("how", ["replacement", "host", "neurons"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llava"])
def test_acting_while_generating_is_acting_on_the_finished_text(family, how):
    model = steered(family, how)
    samples = tiny_samples(family)
    for positions in ("all", "prompt", "generated", "text", "special", "last", (0, 3, -1)):
        acts = [
            Intervention(0, 5, "add", 3.0, positions=positions),
            Intervention(1, 2, "scale", -4.0, positions=positions),
            Intervention(2, 1, "set", 2.0, positions=positions),
        ]
        answers = model.generate_ids(samples, max_new_tokens=5, interventions=acts)
        inputs = model.adapter.prepare(samples, answers=answers)
        best = model.logits(inputs, interventions=acts).argmax(-1)
        for row, answer in enumerate(answers):
            first = int(inputs.answer[row].nonzero()[0])
            assert best[row, first - 1 : first - 1 + len(answer)].tolist() == answer.tolist()
        for other in ({"use_cache": False}, {"batch_size": 1}):
            again = model.generate_ids(samples, max_new_tokens=5, interventions=acts, **other)
            assert [row.tolist() for row in again] == [row.tolist() for row in answers]
        assert (model.logits(inputs, interventions=acts) - model.logits(inputs)).abs().max() > 1e-3


def test_the_host_steered_by_nothing_is_the_host_to_the_bit():
    model = steered("gemma3", "host")
    inputs = model.adapter.prepare(tiny_samples("gemma3"))
    host = model.adapter.logits(inputs)
    for nothing in (None, [], Intervention(1, 3, "scale", 1.0), lambda layer, features: features):
        torch.testing.assert_close(model.logits(inputs, interventions=nothing), host, rtol=0, atol=0)


def test_the_host_is_steered_by_the_decoder_difference_with_errors_kept():
    model = steered("llama", "host")
    adapter, transcoder = model.adapter, model.transcoder
    inputs = adapter.prepare(tiny_samples("llama"), padding_side="right")
    acts = [Intervention(0, 3, "add", 2.0), Intervention(1, 4, "scale", 3.0, positions="prompt")]
    with model.active(inputs, interventions=acts), adapter.capturing(inputs.is_token) as captured:
        adapter.logits(inputs)
    features = transcoder.encode(captured.inputs)
    changed = features.clone()
    changed[0, :, 3] += 2.0
    changed[1, :, 4] *= torch.where(~inputs.answer[inputs.is_token], 3.0, 1.0)
    blocks = adapter.model.model.layers
    own = torch.stack([block.mlp(x) for block, x in zip(blocks, captured.inputs)])
    expected = own + transcoder.decode(changed) - transcoder.decode(features)
    # What is captured leaves the module before the steering hook changes it, or after: compare the next layers' input.
    with adapter.rewriting(lambda layer, x, y: _scatter(expected[layer], inputs.is_token, y)):
        by_hand = adapter.logits(inputs)
    steered_logits = model.logits(inputs, interventions=acts)
    torch.testing.assert_close(steered_logits[inputs.is_token], by_hand[inputs.is_token])


def _scatter(rows, where, like):
    out = like.clone()
    out[where] = rows
    return out


def test_scaling_a_neuron_scales_its_column():
    for family in ("gpt2", "llama", "opt", "phi", "gpt_neox"):
        model = steered(family, "neurons")
        inputs = model.adapter.prepare(tiny_samples(family))
        scaled = model.logits(inputs, interventions=Intervention(1, 5, "scale", 3.0))
        module = model.adapter._down[1].module
        weight = module.weight
        column = weight[5] if type(module).__name__ == "Conv1D" else weight[:, 5]
        with torch.no_grad():
            column *= 3
        expected = model.adapter.logits(inputs)
        torch.testing.assert_close(scaled[inputs.is_token], expected[inputs.is_token])


def test_a_mixture_of_experts_has_no_neurons_to_act_on():
    with pytest.raises(HostModelError, match=r"model.layers.0.mlp .* has no linear layer with 16 outputs"):
        SteeredNeurons(tiny_adapter("mixtral"))


def test_the_standard_deviation_is_that_of_the_features_on_the_samples():
    adapter = tiny_adapter("llama")
    transcoder = plain_transcoder(adapter)
    samples = tiny_samples("llama")
    std = feature_std(adapter, transcoder, samples, batch_size=2)
    features = transcoder.encode(adapter.capture(adapter.prepare(samples)).inputs)
    torch.testing.assert_close(std, features.std(1, correction=0), rtol=1e-4, atol=1e-6)
    dead = std.clone()
    dead[1, 3] = 0
    model = ReplacementModel(adapter, transcoder, feature_std=dead)
    with pytest.raises(ConfigError, match=r"this feature's is 0\.0: it was never on"):
        model.generate(samples, interventions=Intervention(1, 3, "add", 1.0, unit="std"), max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"feature_std is \(2, 12\), but the transcoder has 3 layers of 12"):
        ReplacementModel(adapter, transcoder, feature_std=std[:2])


def test_features_are_captured_as_they_are_computed():
    adapter = tiny_adapter("llava", dtype=torch.float64)
    model = ReplacementModel(adapter, plain_transcoder(adapter), capture_activations=True)
    samples = tiny_samples("llava")
    answers = model.generate_ids(samples, max_new_tokens=4, batch_size=2)
    captured = list(model.captured)
    for use_cache in (True, False):
        model.captured.clear()
        model.generate_ids(samples, max_new_tokens=4, use_cache=use_cache)
        inputs = adapter.prepare(samples, answers=answers)
        expected = features_of(model, inputs)
        for row, (sample, other) in enumerate(zip(captured, model.captured)):
            n = int(inputs.is_token[row].sum()) - 1
            # A row that ends early in its batch goes on with padding, which is read but means nothing.
            assert sample.n_positions >= n
            assert sample.kind[:n].equal(inputs.kind[row, :n])
            assert sample.is_generated[:n].equal(inputs.answer[row, :n])
            for layer in range(3):
                torch.testing.assert_close(sample.dense(layer)[:n], expected[layer][row, :n])
                torch.testing.assert_close(other.dense(layer)[:n], expected[layer][row, :n])


def test_samples_without_an_image_are_refused_where_one_is_to_be_changed():
    model = steered("llava", "host")
    plain = [Sample(id="text", prompt="just text")]
    with pytest.raises(HostModelError, match="no sample has image positions"):
        model.generate(plain, max_new_tokens=2, interventions=Intervention(0, 1, "ablate", positions="image"))
