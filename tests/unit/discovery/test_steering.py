"""Effects are derivatives, controls are matched, patches are weights, intervals are paired, examples the largest."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.benchmarks.base import About, CountingBenchmark, Report, SampleScore
from clt.config import CLTConfig
from clt.discovery.bootstrap import PairedScores
from clt.discovery.controls import matched_controls
from clt.discovery.effects import Effects, Example, Span, feature_effects, forward, span_margins, spans_of
from clt.discovery.examples import TopExamples
from clt.discovery.features_file import LayerFeatures
from clt.discovery.gains import GainOptions, _Batches, learn_gains
from clt.discovery.neurons import NeuronPatch, apply_patch, fit_patch, mean_neuron_strength
from clt.discovery.steering import dose_factors, fixed_gains, swapped
from clt.errors import DiscoveryError
from clt.models import CrossLayerTranscoder
from clt.replacement import Intervention, ReplacementModel, SteeredHost, SteeredNeurons
from clt.types import FeatureId
from tests.tiny_hosts import plain_transcoder, tiny_adapter, tiny_samples

N_FEATURES = 12


def examples(adapter, family="llava"):
    """Random answers, first token good, the rest bad (and the other way round)."""
    found = []
    for number, sample in enumerate(tiny_samples(family)):
        answer = torch.randint(10, 200, (3,), generator=torch.Generator().manual_seed(number))
        flip = number % 2 == 1
        found.append(Example(sample, answer, (Span(0, 1, flip), Span(1, 3, not flip)), "mentions"))
    return found


def real_transcoder(adapter):
    """One that writes linearly, so that differences are taken before writing."""
    config = CLTConfig(num_layers=3, d_model=adapter.d_model, num_features=N_FEATURES, activation_fn="relu")
    transcoder = CrossLayerTranscoder(config)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    assert transcoder.writes_linearly
    return transcoder


def margins(model, batch, gains, keep_errors):
    inputs = model.adapter.prepare([e.sample for e in batch], answers=[e.answer for e in batch])
    with torch.no_grad():
        logits = forward(model, inputs, gains, keep_errors)
    return span_margins(logits, inputs, [e.spans for e in batch])


@pytest.mark.parametrize("keep_errors", [False, True])
def test_effects_are_derivatives_of_the_margins_by_a_factor_on_the_feature(keep_errors):
    adapter = tiny_adapter("llava", dtype=torch.float64)
    model = ReplacementModel(adapter, plain_transcoder(adapter).requires_grad_(False))
    batch = examples(adapter)
    found = feature_effects(model, batch, batch_size=2, keep_errors=keep_errors)
    # The host normalises in single precision, so smaller steps drown in rounding.
    step = 5e-3
    for layer, feature in ((0, 3), (1, 0), (2, 7)):
        values = []
        for sign in (1, -1):
            gains = torch.ones(3, len(batch), N_FEATURES, dtype=torch.float64)
            gains[layer, :, feature] += sign * step
            values.append(margins(model, batch, gains, keep_errors))
        slopes = [(float(up - down) / (2 * step), is_bad) for (up, is_bad), (down, _) in zip(*values)]
        for is_bad, table in ((True, found.bad), (False, found.good)):
            expected = np.mean([slope for slope, label in slopes if label == is_bad])
            assert table[layer, feature] == pytest.approx(expected, rel=5e-3, abs=5e-4)


def test_with_errors_kept_the_forward_pass_is_the_hosts():
    adapter = tiny_adapter("llava", dtype=torch.float64)
    model = ReplacementModel(adapter, plain_transcoder(adapter))
    inputs = adapter.prepare(tiny_samples("llava"))
    with torch.no_grad():
        got = forward(model, inputs, torch.ones(3, 3, N_FEATURES, dtype=torch.float64), keep_errors=True)
    keep = inputs.is_token
    torch.testing.assert_close(got[keep], adapter.logits(inputs)[keep])


def the_same_again(gains):
    """Answers that steering does not change."""
    return examples(tiny_adapter("llava"))


@pytest.mark.parametrize("kind", [ReplacementModel, SteeredHost])
@pytest.mark.parametrize("make", [plain_transcoder, real_transcoder])
@pytest.mark.parametrize("by_part", [True, False])
def test_learned_gains_make_bad_spans_less_likely_on_the_model_they_are_learned_on(kind, make, by_part):
    adapter = tiny_adapter("llava")
    model = kind(adapter, make(adapter).requires_grad_(False))
    batch = examples(adapter)
    chosen = [FeatureId(layer, feature) for layer in range(3) for feature in range(0, N_FEATURES, 2)]
    options = GainOptions(rounds=1, steps=40, bad_weight=1.0, by_part=by_part)
    gains = learn_gains(model, batch, chosen, options, the_same_again)
    assert set(gains) == set(chosen)
    inputs = adapter.prepare([e.sample for e in batch], answers=[e.answer for e in batch])
    gaps = []
    for factors in ({}, gains):
        logits = model.logits(inputs, interventions=fixed_gains(factors, [N_FEATURES] * 3))
        found = span_margins(logits, inputs, [e.spans for e in batch])
        gaps.append(sum(float(m) if bad else -float(m) for m, bad in found))
    assert gaps[1] < gaps[0] - 0.5


def test_one_round_asks_nothing_again_and_every_further_round_asks_under_the_gains_so_far():
    adapter = tiny_adapter("llava")
    model = SteeredHost(adapter, plain_transcoder(adapter).requires_grad_(False))
    chosen = [FeatureId(layer, feature) for layer in range(3) for feature in range(4)]
    seen = []

    def answer_again(gains):
        values = [gains.scale(layer, torch.ones(1, N_FEATURES), lambda: torch.tensor([2])) for layer in range(3)]
        seen.append(torch.cat(values))
        return examples(adapter)

    def learned(rounds):
        return learn_gains(model, examples(adapter), chosen, GainOptions(rounds=rounds, steps=4), answer_again)

    once = learned(1)
    assert seen == []
    learned(3)
    assert len(seen) == 2
    # What the second round's questions are answered under is what a single round would have ended with.
    assert [float(seen[0][feature]) for feature in chosen] == pytest.approx([once[feature][2] for feature in chosen])
    assert not torch.allclose(seen[0], seen[1])


def test_equal_gains_for_every_part_are_one_gain_for_all():
    adapter = tiny_adapter("llava", dtype=torch.float64)
    inputs = adapter.prepare([e.sample for e in examples(adapter)], answers=[e.answer for e in examples(adapter)])
    factors = {FeatureId(0, 2): 3.0, FeatureId(1, 5): 0.0, FeatureId(2, 1): 0.5}
    thrice = {feature: (value,) * 3 for feature, value in factors.items()}
    for kind in (SteeredHost, ReplacementModel):
        model = kind(adapter, plain_transcoder(adapter))
        one, three = (
            model.logits(inputs, interventions=fixed_gains(each, [N_FEATURES] * 3)) for each in (factors, thrice)
        )
        torch.testing.assert_close(one[inputs.is_token], three[inputs.is_token])


@pytest.mark.parametrize("kind", [SteeredHost, ReplacementModel])
def test_a_gain_for_one_part_scales_at_its_positions_only(kind):
    adapter = tiny_adapter("llava", dtype=torch.float64)
    model = kind(adapter, plain_transcoder(adapter))
    batch = examples(adapter)
    inputs = adapter.prepare([e.sample for e in batch], answers=[e.answer for e in batch])
    keep = inputs.is_token
    named = {0: ("image",), 1: ("text", "special"), 2: ("generated",)}
    for part, places in named.items():
        factor = tuple(2.5 if number == part else 1.0 for number in range(3))
        got = model.logits(inputs, interventions=fixed_gains({FeatureId(0, 2): factor}, [N_FEATURES] * 3))
        # "text" and "special" reach into the answer as well: undo them there.
        listed = [Intervention(0, 2, "scale", 2.5, positions=place) for place in places]
        if part == 1:
            listed.append(Intervention(0, 2, "scale", 0.4, positions="generated"))
        wanted = model.logits(inputs, interventions=listed)
        torch.testing.assert_close(got[keep], wanted[keep])
        assert not torch.allclose(got[keep], model.logits(inputs)[keep])


def test_gains_by_part_know_the_answer_while_it_is_being_given():
    adapter = tiny_adapter("llava")
    model = SteeredHost(adapter, plain_transcoder(adapter))
    ids = [FeatureId(layer, feature) for layer in range(3) for feature in range(N_FEATURES)]
    answer_only = fixed_gains(dict.fromkeys(ids, (1.0, 1.0, 4.0)), [N_FEATURES] * 3)
    listed = [Intervention(*each, "scale", 4.0, positions="generated") for each in ids]
    how = {"max_new_tokens": 6, "batch_size": 2}
    samples = tiny_samples("llava")
    got, wanted = (model.generate_ids(samples, interventions=each, **how) for each in (answer_only, listed))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    plain = model.generate_ids(samples, **how)
    assert all(a[0] == b[0] for a, b in zip(got, plain))
    assert any(not torch.equal(a, b) for a, b in zip(got, plain))


def test_effects_and_gains_need_both_kinds_of_spans():
    adapter = tiny_adapter("llava")
    model = ReplacementModel(adapter, plain_transcoder(adapter))
    only_good = [Example(e.sample, e.answer, (Span(0, 1, False),), "mentions") for e in examples(adapter)]
    with pytest.raises(DiscoveryError, match="0 have a bad span"):
        feature_effects(model, only_good)
    with pytest.raises(DiscoveryError, match="0 bad and 3 good"):
        learn_gains(model, only_good, [FeatureId(0, 0)], GainOptions(), the_same_again)


def test_effects_are_read_back(tmp_path):
    arrays = [np.random.default_rng(n).random((2, 5)) for n in range(5)]
    effects = Effects(*arrays, 3, 4)
    effects.save(tmp_path / "e.npz")
    read = Effects.load(tmp_path / "e.npz")
    np.testing.assert_array_equal(read.selective, arrays[0] - arrays[1])
    assert (read.n_bad, read.n_good) == (3, 4)


def test_spans_run_from_mention_to_mention_and_hold_the_decision_to_go_on():
    pieces = ["There", " is", " a", " dog", ",", " two", " cars", " and", " a", " tree", "."]
    details = {"mentioned": ["dog", "car", "tree"], "invented": ["car"]}
    assert spans_of(details, True, pieces) == (Span(0, 4, False), Span(4, 7, True), Span(7, 10, False))
    assert spans_of({}, True, ["No", "."]) == (Span(0, 2, True),)
    assert spans_of({"mentioned": []}, False, ["No"]) == ()


def test_fixed_gains_are_scale_interventions():
    adapter = tiny_adapter("llava", dtype=torch.float64)
    model = SteeredHost(adapter, plain_transcoder(adapter))
    inputs = adapter.prepare(tiny_samples("llava"))
    factors = {FeatureId(0, 2): 3.0, FeatureId(0, 5): 0.0, FeatureId(2, 1): -1.0}
    listed = [Intervention(layer, feature, "scale", value) for (layer, feature), value in factors.items()]
    keep = inputs.is_token
    got = model.logits(inputs, interventions=fixed_gains(factors, [N_FEATURES] * 3))
    torch.testing.assert_close(got[keep], model.logits(inputs, interventions=listed)[keep])
    assert not torch.allclose(got[keep], adapter.logits(inputs)[keep])


@given(seed=st.integers(0, 50))
@settings(max_examples=10)
def test_controls_are_other_active_features_of_the_same_layer_and_alike(seed):
    rng = np.random.default_rng(seed)
    frequency, strength = rng.random((2, 200)), rng.lognormal(size=(2, 200))
    frequency[:, :20] = strength[:, :20] = 0
    chosen = [FeatureId(int(rng.integers(2)), int(n)) for n in rng.choice(np.arange(20, 200), 15, replace=False)]
    controls = matched_controls(chosen, frequency, strength, chosen, seed)
    assert controls == matched_controls(chosen, frequency, strength, chosen, seed)
    assert len({*controls, *chosen}) == 30
    for one, other in zip(chosen, controls):
        assert one.layer == other.layer
        assert frequency[other] > 0
    gaps = [abs(np.log(frequency[a] / frequency[b])) for a, b in zip(chosen, controls)]
    random_gap = np.abs(np.log(frequency[0, 20:][:, None] / frequency[0, 20:])).mean()
    assert np.mean(gaps) < random_gap


def test_factors_move_to_the_controls():
    factors = dose_factors([FeatureId(0, 1)], [FeatureId(1, 2)], 0.5)
    assert factors == {(0, 1): 0.5, (1, 2): 1.5}
    assert swapped(factors, list(factors), [FeatureId(0, 7), FeatureId(1, 8)]) == {(0, 7): 0.5, (1, 8): 1.5}


@pytest.mark.parametrize("family", ["llava", "gpt2"])
def test_a_folded_patch_is_the_scaled_neurons(family, tmp_path):
    adapter = tiny_adapter(family, dtype=torch.float64)
    inputs = adapter.prepare(tiny_samples(family))
    factors = {FeatureId(0, 3): 2.5, FeatureId(2, 0): 0.0, FeatureId(1, 7): -1.0}
    listed = [Intervention(layer, neuron, "scale", value) for (layer, neuron), value in factors.items()]
    wanted = SteeredNeurons(adapter).logits(inputs, interventions=listed)
    NeuronPatch("tiny", 3, tuple(adapter.neuron_counts), factors).save(tmp_path / "patch.json")
    assert apply_patch(adapter, NeuronPatch.load(tmp_path / "patch.json")) == 3
    keep = inputs.is_token
    torch.testing.assert_close(adapter.logits(inputs)[keep], wanted[keep])


def test_a_patch_imitates_the_features_better_than_nothing_and_does_nothing_for_factors_of_one():
    adapter = tiny_adapter("llava")
    transcoder = plain_transcoder(adapter)
    batches = [adapter.prepare(tiny_samples("llava"))]
    factors = {FeatureId(0, 1): 0.0, FeatureId(1, 4): 3.0}
    patch = fit_patch(adapter, transcoder, factors, batches)
    assert all(-4 <= factor <= 4 for factor in patch.factors.values())
    assert max(abs(factor - 1) for factor in patch.factors.values()) > 0.05
    assert fit_patch(adapter, transcoder, dict.fromkeys(factors, 1.0), batches).factors == {}
    assert fit_patch(adapter, transcoder, dict.fromkeys(factors, (1.0, 1.0, 1.0)), batches).factors == {}
    thrice = fit_patch(adapter, transcoder, {feature: (value,) * 3 for feature, value in factors.items()}, batches)
    assert thrice.factors == pytest.approx(patch.factors)
    assert all((each > 0).all() for each in mean_neuron_strength(adapter, batches))


def test_a_patch_for_another_host_or_no_patch_is_refused(tmp_path):
    adapter = tiny_adapter("llava")
    with pytest.raises(DiscoveryError, match=r"\[7, 7\]"):
        apply_patch(adapter, NeuronPatch("other", 2, (7, 7), {}))
    with pytest.raises(DiscoveryError, match="neuron 99"):
        apply_patch(adapter, NeuronPatch("same", 3, tuple(adapter.neuron_counts), {FeatureId(0, 99): 1.0}))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DiscoveryError, match="no neuron patch"):
        NeuronPatch.load(tmp_path / "x.json")


class Share(CountingBenchmark):
    """A metric that is a share of samples."""

    about = About(name="share", summary="", source="", license="", higher_is_better={"share": True})

    def samples(self):
        return []

    def count(self, sample, response):
        raise NotImplementedError

    def verdict(self, score):
        return "good"

    def metrics(self, totals):
        return {"share": 100 * totals["right"] / totals["n"]}


def report(values):
    scores = tuple(SampleScore(id=str(n), counts={"right": int(v), "n": 1}) for n, v in enumerate(values))
    return Report(metrics={"share": 100 * float(np.mean(values))}, scores=scores, provenance={})


def test_intervals_are_paired_and_resample_whole_images():
    rng = np.random.default_rng(0)
    before = (rng.random(400) < 0.5).astype(int)
    after = before.copy()
    after[:40] = 1 - before[:40]
    pairs = PairedScores(Share(), {str(n): f"image-{n // 4}" for n in range(400)})
    same = pairs.changes(report(before), report(before))["share"]
    assert same == {"value": 0.0, "interval": [0.0, 0.0]}
    change = pairs.changes(report(before), report(after))["share"]
    low, high = change["interval"]
    assert low < change["value"] < high
    # Unpaired the interval of a share of 400 would be about 14 points wide.
    assert high - low < 10
    with pytest.raises(DiscoveryError, match="same samples"):
        pairs.changes(report(before), report(after[:-1]))


@given(seed=st.integers(0, 30), keep=st.integers(1, 4))
@settings(max_examples=15)
def test_the_heap_keeps_the_strongest_samples(seed, keep):
    rng = np.random.default_rng(seed)
    top = TopExamples([FeatureId(0, 3), FeatureId(1, 5)], keep)
    peaks = {FeatureId(0, 3): [], FeatureId(1, 5): []}
    for number in range(12):
        matrices = [(rng.random((6, 8)) < 0.3) * rng.random((6, 8)) for _ in range(2)]
        top.add(number, {n: LayerFeatures.from_dense(torch.from_numpy(m).float()) for n, m in enumerate(matrices)})
        for feature in peaks:
            column = matrices[feature.layer][:, feature.feature]
            if column.any():
                peaks[feature].append((float(np.float32(column.max())), -number))
    for feature, expected in peaks.items():
        got = [(peak.activation, -peak.sample) for peak in top.top(feature)]
        assert got == sorted(expected, reverse=True)[:keep]


def test_cantor_numbers_are_circuit_tracers():
    assert FeatureId(0, 0).number == 0
    assert FeatureId(8, 3648).number == (8 + 3648) * (8 + 3648 + 1) // 2 + 3648


def test_batches_come_in_turns_so_that_every_answer_is_learned_from_equally_often():
    adapter = tiny_adapter("llava")
    answers = [replace(each, task=f"{n}") for n, each in enumerate([*examples(adapter)] * 3)]
    rng = np.random.default_rng(0)
    batches = _Batches(adapter, answers, 2, rng)
    n_batches = -(-len(answers) // 2)
    for _ in range(2):
        drawn = [each.task for _ in range(n_batches) for each in batches.draw(rng)[0]]
        assert sorted(drawn) == sorted(each.task for each in answers)
