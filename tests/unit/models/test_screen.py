"""The encoder that looks by bf16 products first keeps what fp32 keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.models.kernels import build, matmul
from clt.models.kernels.sparse import encode_topk, keep_topk

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler on this machine")


def layer(tokens, features, width, seed, spread=1.0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=rng) * torch.rand(tokens, 1, generator=rng).mul(spread).exp()
    weight = torch.randn(features, width, generator=rng) * torch.rand(features, 1, generator=rng).mul(spread).exp()
    return x, weight, torch.randn(features, generator=rng), torch.rand(features, generator=rng) * 2


def screened(monkeypatch, *arguments):
    monkeypatch.setenv("CLT_SCREEN", "1")
    return encode_topk(*arguments)


@given(
    tokens=st.integers(1, 9),
    features=st.sampled_from([1, 5, 64, 300, 1000]),
    width=st.sampled_from([1, 7, 64, 130]),
    k=st.sampled_from([1, 2, 8, 40, 2000]),
    spread=st.sampled_from([0.0, 3.0]),
    scaled=st.booleans(),
    seed=st.integers(0, 999),
)
def test_what_is_kept_is_what_exact_scores_say(tokens, features, width, k, spread, scaled, seed):
    x, weight, bias, scale = layer(tokens, features, width, seed, spread)
    with pytest.MonkeyPatch.context() as patch:
        kept = screened(patch, x, weight, bias, scale if scaled else None, k)
    exact = torch.addmm(bias.double(), x.double(), weight.double().T)
    scores = exact * scale.double() if scaled else exact
    k = min(k, features)
    assert torch.equal(kept.offsets, torch.arange(tokens + 1) * k)
    chosen = kept.features.view(tokens, k)
    assert (chosen.diff(dim=1) > 0).all()
    slack = 1e-5 * (x.norm(dim=1)[:, None] * weight.norm(dim=1) + bias.abs()).double()
    torch.testing.assert_close(kept.values.double().view(tokens, k), exact.gather(1, chosen), rtol=1e-4, atol=1e-4)
    # Nothing left out scores higher than something kept, but for the digits that fp32 does not have.
    left_out = torch.ones_like(scores, dtype=torch.bool).scatter_(1, chosen, False)
    least = (scores + slack * 2).gather(1, chosen).min(1).values
    assert not (left_out & (scores - slack * 2 > least[:, None])).any()


def test_features_and_values_are_those_of_the_whole_matrix(monkeypatch):
    x, weight, bias, scale = layer(64, 512, 48, seed=3)
    kept, whole = (
        screened(monkeypatch, x, weight, bias, scale, 20),
        keep_topk(torch.addmm(bias, x, weight.T), scale, 20),
    )
    assert torch.equal(kept.features, whole.features)
    torch.testing.assert_close(kept.values, whole.values, rtol=1e-5, atol=1e-5)


def test_among_equals_the_first_are_kept(monkeypatch):
    x, weight, bias = torch.ones(2, 16), torch.ones(200, 16), torch.zeros(200)
    kept = screened(monkeypatch, x, weight, bias, None, 5)
    assert kept.features.tolist() == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_in_fp32_is_kept_as_such(monkeypatch, value):
    x, weight, bias, _ = layer(3, 300, 32, seed=1)
    x[1, 5] = value
    weight[:, 5] = 4.0
    kept = screened(monkeypatch, x, weight, bias, None, 8)
    values = kept.values.view(3, 8)
    assert not values[1].isfinite().any()
    assert values[[0, 2]].isfinite().all()


def test_screening_is_left_out_where_products_are_small_or_it_is_not_wanted(monkeypatch):
    monkeypatch.delenv("CLT_SCREEN", raising=False)
    assert not matmul.bf16_screens(10)
    monkeypatch.setenv("CLT_SCREEN", "0")
    assert not matmul.bf16_screens(2**40)
