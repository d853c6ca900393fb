"""Every term of the loss against its formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.config import CLTConfig, TrainingConfig
from clt.models import CrossLayerTranscoder, jumprelu
from clt.training.losses import LossManager, reconstruction_loss
from clt.training.schedules import k_factor, learning_rate_factor, sparsity_weight


def losses_of(model, x, y, step=9, dead=None, **options):
    config = TrainingConfig(training_steps=10, **options)
    dead = torch.zeros(3, 6, dtype=torch.bool) if dead is None else dead
    return LossManager(config).compute(model, model.forward_training(x), x, y, step, dead)


def model_and_data(tokens=40, seed=0, **options):
    torch.manual_seed(seed)
    options = {"activation_fn": "jumprelu", **options}
    config = CLTConfig(num_features=6, num_layers=3, d_model=4, **options)
    model = CrossLayerTranscoder(config).double()
    return model, torch.randn(3, tokens, 4, dtype=torch.float64), torch.randn(tokens, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"activation_fn": "relu"}, {"activation_fn": "topk", "topk_k": 2}])
def test_losses_are_means_over_tokens_so_the_batch_size_changes_nothing(options):
    model, x, y = model_and_data(**options)
    dead = torch.zeros(3, 6, dtype=torch.bool)
    dead[:, :2] = True
    once = losses_of(model, x, y, dead=dead)
    twice = losses_of(model, torch.cat([x, x], 1), torch.cat([y, y]), dead=dead)
    for name in ("reconstruction", "sparsity", "preactivation", "auxiliary"):
        torch.testing.assert_close(getattr(twice, name), getattr(once, name))


def test_reconstruction_with_variance_is_the_sum_of_the_targets_nmse():
    y, error = torch.randn(50, 3, 4), torch.randn(50, 3, 4)
    variance = (y - y.mean(0)).square().sum(2).mean(0)
    nmse = error.square().sum((0, 2)) / (y - y.mean(0)).square().sum((0, 2))
    torch.testing.assert_close(reconstruction_loss(error, variance), nmse.sum())


def test_the_seeds_reconstruction_is_the_sum_of_raw_mean_squared_errors():
    model, x, y = model_and_data()
    model.target_scale.fill_(2.0)
    raw = (y - model.forward_training(x).reconstruction) / 2
    expected = raw.square().mean((0, 2)).sum()
    torch.testing.assert_close(losses_of(model, x, y, loss_normalisation="none").reconstruction, expected)


@given(factor=st.floats(0.1, 10.0), seed=st.integers(0, 50))
def test_the_price_ignores_how_scale_is_split_between_encoder_and_decoder(factor, seed):
    model, x, y = model_and_data(seed=seed, activation_fn="relu")
    price = losses_of(model, x, y).sparsity
    with torch.no_grad():
        for layer in range(3):
            model.W_enc[layer].mul_(factor)
            model.b_enc[layer].mul_(factor)
            model.W_dec[layer].div_(factor)
    torch.testing.assert_close(losses_of(model, x, y).sparsity, price)


def test_the_seeds_sparsity_is_summed_over_tokens():
    model, x, y = model_and_data(activation_fn="relu")
    mean = losses_of(model, x, y).sparsity
    total = losses_of(model, x, y, sparsity_reduction="sum_tokens").sparsity
    torch.testing.assert_close(total, mean * 40)


def test_preactivation_penalty_matches_both_formulas():
    model, x, y = model_and_data()
    h = model.forward_training(x).preactivations
    ours = sum(((model.threshold(s) - h[s]).relu() * model.decoder_norm(s)).sum() for s in range(3)) / 40
    torch.testing.assert_close(losses_of(model, x, y, preactivation_coef=1.0).preactivation, ours)
    seeds = torch.stack([(-h[s]).relu() for s in range(3)]).mean()
    form = losses_of(model, x, y, preactivation_coef=1.0, preactivation_form="negative").preactivation
    torch.testing.assert_close(form, seeds)


def test_aux_loss_reaches_dead_features_only_and_not_through_the_residual():
    model, x, y = model_and_data(activation_fn="topk", topk_k=2)
    dead = torch.zeros(3, 6, dtype=torch.bool)
    dead[:, 4:] = True
    losses_of(model, x, y, dead=dead, aux_loss_factor=1.0).auxiliary.backward()
    for layer in range(3):
        assert (model.W_enc[layer].grad[:4] == 0).all()
        assert (model.W_dec[layer].grad[:4] == 0).all()
        assert model.W_dec[layer].grad[4:].abs().sum() > 0
    assert model.b_dec.grad is None


@pytest.mark.parametrize("gradient", ["theta", "h"])
@given(seed=st.integers(0, 50))
def test_jumprelu_gradients_are_the_stated_straight_through_formula(gradient, seed):
    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(30, 5, generator=rng, dtype=torch.float64).requires_grad_()
    theta = (torch.rand(5, generator=rng, dtype=torch.float64) + 0.1).requires_grad_()
    upstream = torch.randn(30, 5, generator=rng, dtype=torch.float64)
    (jumprelu(h, theta, 0.7, gradient) * upstream).sum().backward()

    near = ((h - theta).abs() < 0.35).double()
    height = theta if gradient == "theta" else h
    torch.testing.assert_close(h.grad, upstream * (h > theta))
    torch.testing.assert_close(theta.grad, -(upstream * near * height / 0.7).sum(0).detach())


def test_jumprelu_threshold_gradient_is_right_in_expectation():
    # For h uniform, E[h 1(h > theta)] has derivative -theta * density; the kernel estimate must agree.
    h = torch.rand(400_000, 1, dtype=torch.float64) * 4
    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    jumprelu(h, theta, 0.5).mean().backward()
    assert theta.grad.item() == pytest.approx(-1.0 * 0.25, rel=0.02)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [1, 1, 1]),
        ("linear", [1, 0.5, 0.1]),
        ("cosine", [1, 0.5, 0.0245]),
        ("linear_final20", [1, 1, 0.5]),
    ],
)
def test_learning_rate_schedules_at_start_middle_and_last_step(name, values):
    config = TrainingConfig(training_steps=10, lr_scheduler=name)
    assert [learning_rate_factor(config, step) for step in (0, 5, 9)] == pytest.approx(values, abs=1e-3)


def test_warm_up_rises_to_the_peak_and_then_the_schedule_starts():
    config = TrainingConfig(training_steps=10, lr_scheduler="linear", lr_warmup_steps=4)
    assert [learning_rate_factor(config, step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_sparsity_schedules():
    linear = TrainingConfig(training_steps=10, sparsity_lambda=2.0)
    assert sparsity_weight(linear, 4) == pytest.approx(1.0)
    assert sparsity_weight(linear, 9) == pytest.approx(2.0)
    delayed = linear.replace(sparsity_lambda_schedule="delayed_linear", sparsity_lambda_delay_frac=0.5)
    assert sparsity_weight(delayed, 4) == 0
    assert sparsity_weight(delayed, 9) == pytest.approx(2.0)


def test_k_annealing_falls_to_one():
    config = TrainingConfig(training_steps=100, k_anneal_steps=10, k_anneal_start=4.0)
    assert [k_factor(config, step) for step in (0, 5, 10, 99)] == pytest.approx([4.0, 2.5, 1.0, 1.0])


def test_dead_topk_features_are_pulled_back_and_living_ones_are_not():
    model, x, y = model_and_data(activation_fn="topk", topk_k=2)
    for bias in model.b_enc:
        bias.data[4:] = -50.0  # negative on every token: AuxK's rectified reconstruction has no gradient for them
    dead = torch.zeros(3, 6, dtype=torch.bool)
    dead[:, 4:] = True
    losses = losses_of(model, x, y, dead=dead, preactivation_coef=1.0)
    (losses.preactivation + losses.auxiliary).backward()
    for layer in range(3):
        assert (model.b_enc[layer].grad[4:] < 0).all()
        assert (model.b_enc[layer].grad[:4] == 0).all()
