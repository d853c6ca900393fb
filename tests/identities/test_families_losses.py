"""Gradients of losses and activations against finite differences, for every family."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.config import TrainingConfig
from clt.models import CrossLayerTranscoder, JumpReLU, jumprelu
from clt.models.codes import DenseCodes, SparseCodes
from clt.replacement.intervention import Edit
from clt.replacement.passes import Passes
from clt.replacement.running import RunningPrediction
from clt.training.losses import LossManager, span_price
from tests.identities.test_families import (
    FAMILIES,
    FEATURES,
    LAYERS,
    TOKENS,
    WIDTH,
    config_of,
    families,
    few,
    inputs_for,
    pairs_of,
    transcoder_of,
)
from tests.tiny_hosts import tiny_adapter

ALIVE = torch.zeros(LAYERS, FEATURES, dtype=torch.bool)


def along_a_direction(model, term, seed):
    """The derivative of a term along a random direction of all parameters: by autograd, and by differences."""
    rng = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.numel()]
    direction = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in parameters]
    grads = torch.autograd.grad(term(), parameters, allow_unused=True)
    analytic = sum((g * d).sum() for g, d in zip(grads, direction) if g is not None)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, way in zip(parameters, direction):
                parameter += step * way
            values.append(term())
    return analytic, (values[0] - values[1]) / 2e-6


@families
@pytest.mark.parametrize("options", [{"activation_fn": "relu"}, {"activation_fn": "topk", "topk_k": 3}], ids=str)
@few
@given(seed=st.integers(0, 99))
def test_the_gradient_of_the_loss_is_its_finite_difference(family, options, seed):
    model, x = transcoder_of(family, seed=seed, **options), inputs_for(seed=seed)
    targets = torch.randn(TOKENS, LAYERS, WIDTH, dtype=torch.float64)
    losses = LossManager(
        TrainingConfig(training_steps=10, sparsity_lambda=0.3, sparsity_span_penalty=0.5, aux_loss_factor=None)
    )
    analytic, difference = along_a_direction(
        model, lambda: losses.compute(model, model.forward_training(x), x, targets, 9, ALIVE).total, seed
    )
    torch.testing.assert_close(analytic, difference, rtol=1e-4, atol=1e-4)


@families
@few
@given(seed=st.integers(0, 99))
def test_the_gradient_of_the_preactivation_penalty_is_its_finite_difference(family, seed):
    model, x = transcoder_of(family, "jumprelu", seed=seed), inputs_for(seed=seed)
    losses = LossManager(TrainingConfig(training_steps=10, preactivation_coef=1.0))
    targets = torch.zeros(TOKENS, LAYERS, WIDTH, dtype=torch.float64)
    analytic, difference = along_a_direction(
        model, lambda: losses.compute(model, model.forward_training(x), x, targets, 9, ALIVE).preactivation, seed
    )
    torch.testing.assert_close(analytic, difference, rtol=1e-4, atol=1e-4)


def ramp(h, theta, width):
    """jumprelu with its step smeared over a width: the surrogate behind the straight-through term."""
    return h * ((h - theta) / width + 0.5).clamp(0, 1)


@few
@given(seed=st.integers(0, 99))
def test_jumprelu_gradients_are_finite_differences_of_the_smeared_step(seed):
    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(30, 5, generator=rng, dtype=torch.float64).requires_grad_()
    theta = (torch.rand(5, generator=rng, dtype=torch.float64) + 0.1).requires_grad_()
    upstream = torch.randn(30, 5, generator=rng, dtype=torch.float64)
    width, tiny = 0.7, 1e-6
    (jumprelu(h, theta, width, "h", "all") * upstream).sum().backward()

    with torch.no_grad():
        by_theta = (ramp(h, theta + tiny, width) - ramp(h, theta - tiny, width)) / (2 * tiny)
        by_h = (ramp(h + tiny, theta, width) - ramp(h - tiny, theta, width)) / (2 * tiny)
        # Off the window the surrogate is the function; inside, the step itself is the hard one going forward.
        hard_for_soft = (h > theta).double() - ((h - theta) / width + 0.5).clamp(0, 1)
    torch.testing.assert_close(theta.grad, (upstream * by_theta).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad, upstream * (by_h + hard_for_soft), rtol=1e-5, atol=1e-5)


def test_the_seeds_jumprelu_takes_three_arguments_and_has_its_gradient():
    h = torch.randn(30, 5, dtype=torch.float64)
    results = []
    for activation in (lambda theta: JumpReLU.apply(h, theta, 1.0), lambda theta: jumprelu(h, theta, 1.0, "h")):
        theta = torch.full((5,), 0.1, dtype=torch.float64, requires_grad=True)
        activation(theta).square().sum().backward()
        results.append(theta.grad)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(("reach", "expected"), [("threshold", 0.75), ("all", 0.75 + 1.0 * 0.25)])
def test_only_with_reach_all_does_the_encoder_bias_see_features_switch_on(reach, expected):
    # h uniform on [0, 4]: raising a bias raises E[a] by P(h > theta) plus theta * density for those that switch on.
    h = torch.rand(400_000, 1, dtype=torch.float64) * 4
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    jumprelu(h + bias, torch.tensor([1.0], dtype=torch.float64), 0.5, "theta", reach).mean().backward()
    assert bias.grad.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("reach", ["threshold", "all"])
def test_the_configured_reach_decides_whether_silent_features_train_their_encoder(reach):
    model = transcoder_of("untied", "jumprelu", jumprelu_reach=reach, jumprelu_bandwidth=20.0)
    with torch.no_grad():
        for threshold in model.log_threshold:
            threshold.fill_(2.0)  # exp(2) = 7.4: nothing fires, everything is within 10 of it
    forward = model.forward_training(inputs_for())
    assert not any(code.dense().any() for code in forward.codes)
    forward.reconstruction.sum().backward()
    assert all(weight.grad.any() == (reach == "all") for weight in model.W_enc)
    assert all(threshold.grad.any() for threshold in model.log_threshold)


@families
@few
@given(seed=st.integers(0, 50))
def test_the_span_price_is_paid_by_distance(family, seed):
    model = transcoder_of(family, "jumprelu", seed=seed)
    forward = model.forward_training(inputs_for(seed=seed))
    expected = torch.zeros((), dtype=torch.float64)
    for source, target in pairs_of(model.config):
        norm = (model.decoder(source, target) * model.target_scale[target]).square().sum(1).sqrt()
        price = (3.0 * norm * forward.codes[source].dense()).tanh().sum()
        expected = expected + (target - source) * price
    torch.testing.assert_close(span_price(model, forward, 3.0), expected)


def test_the_span_penalty_is_off_by_default_and_nothing_for_a_per_layer_transcoder():
    targets, x = torch.zeros(TOKENS, LAYERS, WIDTH, dtype=torch.float64), inputs_for()
    for window, changes in (((0, None), True), ((0, 1), False), ((1, 1), True)):
        model = transcoder_of("untied", "jumprelu", window=window)
        plain, spanned = (
            LossManager(TrainingConfig(training_steps=10, **options))
            .compute(model, model.forward_training(x), x, targets, 9, ALIVE)
            .sparsity
            for options in ({}, {"sparsity_span_penalty": 0.5})
        )
        assert (spanned > plain).item() is changes


@families
@pytest.mark.parametrize("window", [(0, None), (1, None), (1, 2)])
def test_layer_by_layer_the_replacement_predicts_what_the_transcoder_does(family, window):
    model, x = transcoder_of(family, window=window), inputs_for()
    passes = Passes(tiny_adapter("llama"), None)
    running = RunningPrediction(model, range(LAYERS), passes, Edit(None, passes, [FEATURES] * LAYERS))
    predicted = torch.stack([running.predict(layer, x[layer]) for layer in range(LAYERS)])
    torch.testing.assert_close(predicted, model(x))


@few
@given(density=st.sampled_from([0.0, 0.4, 1.0]), shared=st.booleans(), seed=st.integers(0, 99))
def test_sparse_codes_shifted_for_every_target_at_once_equal_dense_ones(density, shared, seed):
    rng = torch.Generator().manual_seed(seed)
    keep = torch.rand(TOKENS, FEATURES, generator=rng) < density
    results = []
    upstream = torch.randn(TOKENS, 3 * WIDTH, generator=rng, dtype=torch.float64)
    leaves = [torch.rand(TOKENS, FEATURES, generator=rng, dtype=torch.float64)]
    leaves.append(torch.randn(FEATURES, 1 if shared else 3, WIDTH, generator=rng, dtype=torch.float64))
    leaves.extend(torch.randn(3, FEATURES, generator=rng, dtype=torch.float64) for _ in range(2))
    for make in (lambda v: DenseCodes(v * keep), lambda v: SparseCodes.from_mask(v, keep)):
        values, weight, offset, scale = (leaf.clone().requires_grad_() for leaf in leaves)
        decoded = make(values).decode_each(weight, offset, scale, 3)
        (decoded * upstream).sum().backward()
        results.append((decoded, values.grad * keep, weight.grad, offset.grad, scale.grad))
    for dense, sparse in zip(*results):
        torch.testing.assert_close(sparse, dense)


@families
def test_initial_weights_of_the_first_features_do_not_depend_on_how_many_there_are(family):
    large = CrossLayerTranscoder(config_of(family).replace(num_features=600), seed=2)
    small = CrossLayerTranscoder(config_of(family).replace(num_features=256), seed=2)
    for name in ("W_dec", "U_dec", "feature_scale"):
        for big, little in zip(getattr(large, name, ()), getattr(small, name, ())):
            axis = 0 if name != "feature_scale" or big.dim() == 1 else 1
            torch.testing.assert_close(big.narrow(axis, 0, 256), little)


def test_every_family_is_tested():
    used = {(o.get("decoder_tying", "none"), "decoder_rank" in o) for o in FAMILIES.values()}
    assert used == {("none", False), ("per_source", False), ("per_target", False), ("none", True)}
