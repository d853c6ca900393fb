"""Adam with bf16 moments: right on average, and the same however often it is interrupted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.models import CrossLayerTranscoder
from clt.training.half_adam import HalfAdam, round_at_random
from clt.training.memory import step_memory
from clt.training.optim import build_optimizer, optimizer_tensors, restore_optimizer
from clt.training.step import Engine
from clt.types import ActivationBatch


@given(value=st.floats(-(2.0**99), 2.0**99, width=32), seed=st.integers(0, 99))
def test_a_number_becomes_one_of_its_two_neighbours(value, seed):
    rounded = round_at_random(torch.tensor([value]), torch.Generator().manual_seed(seed)).float()
    bits = torch.tensor([value]).view(torch.int32) & -(1 << 16)
    towards_zero, further = bits.view(torch.float32), (bits + (1 << 16)).view(torch.float32)
    assert rounded == towards_zero or (rounded == further and towards_zero != value)


@given(value=st.floats(2.0**-66, 2.0**66, width=32), sign=st.sampled_from([-1.0, 1.0]))
def test_rounding_at_random_is_right_on_average(value, sign):
    n = 20_000
    values = torch.full((n,), sign * value)
    rounded = round_at_random(values, torch.Generator().manual_seed(0)).double()
    spacing = value * 2**-7  # of bf16, at most; the standard error is at most half of it over sqrt(n)
    assert abs(rounded.mean() - values[0].double()) < 5 * spacing / 2 / n**0.5


def test_what_is_not_finite_stays_as_it_is():
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    for seed in range(20):
        rounded = round_at_random(values, torch.Generator().manual_seed(seed)).float()
        torch.testing.assert_close(rounded, values, equal_nan=True, rtol=0, atol=0)


def model():
    return CrossLayerTranscoder(CLTConfig(num_features=24, num_layers=2, d_model=8, activation_fn="topk", topk_k=4))


def batch(seed, tokens=64):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 8, generator=rng)
    rows = torch.arange(tokens)
    targets = torch.tanh(x) + 0.5 * x.flip(2)
    return ActivationBatch(x, targets, torch.zeros(tokens, dtype=torch.uint8), rows, rows)


def losses(engine, steps):
    dead = torch.zeros(2, 24, dtype=torch.bool)
    return torch.tensor([float(engine.step(batch(step), step, dead).losses.total) for step in steps])


def engine(**options):
    given = {"training_steps": 300, "learning_rate": 3e-3, "optimizer_state": "bf16", **options}
    return Engine(model(), TrainingConfig(**given))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_loss_of_twenty_steps_stays_within_two_percent_of_fp32_moments(optimizer):
    options = {"optimizer": optimizer, "weight_decay": 0.01}
    ours = losses(engine(**options), range(120))
    fp32 = losses(engine(**options, optimizer_state="fp32"), range(120))
    assert fp32[-1] < 0.8 * fp32[0]
    torch.testing.assert_close(ours.view(6, 20).mean(1), fp32.view(6, 20).mean(1), rtol=2e-2, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_first_step_is_torchs(optimizer):
    """Moments start at zero, and what updates the weights is not rounded yet."""
    weights = []
    for state in ("fp32", "bf16"):
        one = engine(optimizer=optimizer, weight_decay=0.1, optimizer_state=state)
        losses(one, range(1))
        weights.append(dict(one.model.named_parameters()))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("streams", [False, True])
def test_a_run_gone_on_with_takes_the_same_steps(streams):
    options = {"optimizer_in_backward": streams, "gradient_clip_val": None}
    whole = engine(**options)
    losses(whole, range(6))
    first, second = engine(**options), engine(**options)
    losses(first, range(3))
    second.model.load_state_dict(first.model.state_dict())
    saved = {name: value.clone() for name, value in optimizer_tensors(first.optimizer, first.owned.parameters).items()}
    restore_optimizer(second.optimizer, second.owned.parameters, saved)
    losses(second, range(3, 6))
    for (name, one), other in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_seed_decides_the_rounding():
    moments = []
    for seed in (1, 1, 2):
        one = engine(seed=seed)
        losses(one, range(2))
        moments.append(optimizer_tensors(one.optimizer, one.owned.parameters)["W_dec.0/exp_avg_sq"])
    assert moments[0].dtype == torch.bfloat16
    assert torch.equal(moments[0], moments[1])
    assert not torch.equal(moments[0], moments[2])


def test_it_saves_four_bytes_per_weight_and_is_no_8_bit_optimiser():
    config, half = CLTConfig(num_features=1000, num_layers=2, d_model=64), TrainingConfig(optimizer_state="bf16")
    assert isinstance(build_optimizer(dict(model().named_parameters()), half, 24), HalfAdam)
    saved = step_memory(config, TrainingConfig(), 512, "dense").total - step_memory(config, half, 512, "dense").total
    assert saved == 4 * sum(p.numel() for p in CrossLayerTranscoder(config).parameters())
    with pytest.raises(ConfigError, match="optimizer_state = 'bf16' does not go with optimizer = 'adamw8bit'"):
        TrainingConfig(optimizer="adamw8bit", optimizer_state="bf16")
