"""The Boolean circuits are what they say, and measures of faithfulness see the difference."""

import pytest
import torch

from clt.attribution.faithfulness.boolean import FORMULAS, measure_formula, neurons_as_transcoder
from clt.attribution.faithfulness.effects import MEASURES, measure_effects, spearman
from clt.attribution.faithfulness.host_runs import deltas, edited_logits, edited_run, predicted_run
from clt.lm import ModelAdapter
from clt.replacement import ReplacementModel
from clt.worlds.boolean import NO, YES
from tests.attribution_hosts import random_replacement
from tests.tiny_hosts import tiny_samples

formulas = pytest.mark.parametrize("world", FORMULAS, ids=lambda world: world.name)


@formulas
def test_the_host_computes_its_formula_with_the_neurons_it_names(world):
    adapter = ModelAdapter(world.host(), name=world.name)
    inputs = adapter.prepare_tokens(world.prompts())
    logits = adapter.logits(inputs)[:, -1]
    assert torch.equal(logits[:, YES] > logits[:, NO], world.answers())
    batch = adapter.capture(inputs)
    batch = batch.select(batch.position > 0)
    transcoder = neurons_as_transcoder(adapter)
    assert torch.equal(transcoder.encode(batch.inputs) > 1e-3, world.neurons())
    torch.testing.assert_close(transcoder(batch.inputs), batch.targets, rtol=1e-4, atol=1e-4)


def test_graphs_over_the_circuits_own_neurons_are_the_circuit():
    found = measure_formula(FORMULAS[0], "neurons", steps=1)
    assert found["gates_found"] == 1.0
    assert found["short_cut"] == 0.0
    assert found["right"] == 1.0
    assert found["largest_row_sum_error"] < 1e-5


def test_effects_of_a_transcoder_of_all_relu_neurons_are_predicted_by_the_local_replacement():
    """Two ReLU layers, one position, norms that only rescale: held and live runs agree but for the norms."""
    world = FORMULAS[1]
    adapter = ModelAdapter(world.host(), name=world.name)
    model = ReplacementModel(adapter, neurons_as_transcoder(adapter))
    before, after = edited_logits(model, adapter.prepare_tokens(world.prompts()[3:4]), [[], [(0, 1, 0, 0.0)]])
    # Without its AND gate the XOR no longer holds.
    assert before[YES] > before[NO]
    assert after[YES] < after[NO]


def test_without_error_the_prediction_is_the_hosts_reaction_but_for_norms():
    """The MLPs' own neurons as features: what is left between prediction and host is the norms' denominators."""
    world = FORMULAS[1]
    adapter = ModelAdapter(world.host(), name=world.name)
    model = ReplacementModel(adapter, neurons_as_transcoder(adapter))
    inputs = adapter.prepare_tokens(world.prompts()[3:4])
    linear = adapter.linearised(inputs)
    added = deltas(model, linear.reads, [[], [(0, 1, 0, 0.0)]])
    predicted, (held, _) = predicted_run(model, linear, added), edited_run(model, inputs, added, hold_patterns=True)
    for guess, truth in ((predicted.reads, held.reads), (predicted.wrote, held.wrote)):
        torch.testing.assert_close(guess[:, 0], truth[:, 0], rtol=1e-4, atol=1e-4)
        change, expected = guess[1, 1] - guess[1, 0], truth[1, 1] - truth[1, 0]
        assert expected.abs().max() > 0.1
        assert torch.cosine_similarity(change.flatten(), expected.flatten(), dim=0) > 0.9


def test_effects_have_a_curve_per_distance():
    model, _ = random_replacement("llama")
    result = measure_effects(model, tiny_samples("llama")[:2], per_prompt=6)
    for name in MEASURES:
        rows = result["by_distance"][name]
        assert [row["distance"] for row in rows] == [1, 2]
        assert all(-1 <= row["cosine"] <= 1 and row["nmse_median"] >= 0 for row in rows)
    assert -1 <= result["ablation_spearman"] <= 1


def test_spearman_is_about_ranks_alone():
    first = torch.tensor([1.0, 5.0, 3.0, 3.0])
    assert spearman(first, first.exp()) == pytest.approx(1.0)
    assert spearman(first, -first) == pytest.approx(-1.0)
    assert spearman(first, torch.ones(4)) == 0.0
