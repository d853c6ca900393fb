"""Triton's kernels beside plain torch: on a GPU, or by Triton's interpreter on a CPU."""

import importlib.util

import pytest
import torch

from clt.models.kernels import gate, sparse, torch_sparse
from clt.models.kernels.gate import GateTerms

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton extra")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TERMS = {
    "none": GateTerms(),
    "all": GateTerms(price=0.3, steepness=2.0, pull=0.2, bandwidth=0.5),
    "seeds": GateTerms(price=0.3, pull=0.1, negative=True, bandwidth=0.5, height_is_h=True, reaches_h=True),
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("CLT_KERNELS", "triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def in_torch(monkeypatch, work):
    """What the same call gives without Triton and without compiled kernels."""
    with monkeypatch.context() as patch:
        patch.setenv("CLT_KERNELS", "torch")
        return work()


def assert_same_entries(found, wanted):
    assert torch.equal(found.features, wanted.features)
    assert torch.equal(found.offsets, wanted.offsets)
    assert torch.equal(found.values, wanted.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("features", "k"), [(5, 5), (300, 1), (300, 7), (1024, 40), (1500, 1499), (5000, 9), (5000, 2600)]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_topk_keeps_what_a_stable_sort_puts_first(dtype, features, k, scaled):
    h = random(9, features, dtype=dtype)
    h[1] = 0.25  # all alike
    h[2, : features // 2] = -0.0
    h[3, features // 2 :] = h[3, 0]
    h[4] = -h[4].abs()
    h[5, features // 3] = torch.nan
    h[6, 0] = -torch.inf
    scale = torch.ones(features, device=DEVICE) if scaled else None
    kept = sparse.keep_topk(h, scale, k)
    place = (h.float() + 0.0).sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    assert torch.equal(kept.features.view(9, k), place)
    torch.testing.assert_close(kept.values.view(9, k), h.float().gather(1, place), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_above_a_bound(monkeypatch, dtype):
    h, scale, bound = random(33, 2500, dtype=dtype), random(2500, seed=1).abs(), random(2500, seed=2)
    h[3] = -50.0
    for by in (None, scale):
        found, scores = sparse.keep_above(h, by, bound)
        wanted, wanted_scores = in_torch(monkeypatch, lambda by=by: sparse.keep_above(h, by, bound))
        assert_same_entries(found, wanted)
        torch.testing.assert_close(scores, wanted_scores.to(scores.dtype))
    h[5, 7] = torch.nan
    assert sparse.keep_above(h, None, bound)[0].values.isnan().any()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_and_its_gradients_over_several_blocks(monkeypatch, dtype, adds):
    """More columns than a block, more entries of a token and of a feature than are read at once, and rests of each."""
    tokens, features, width = 21, 30, 1100
    kept = sparse.keep_topk(random(tokens, features, dtype=dtype), None, 11)
    weight, scale = random(features, width, seed=1, dtype=dtype), random(features, seed=2, dtype=dtype)
    grad = random(tokens, width + 40, seed=3, dtype=dtype)[:, 17 : width + 17]

    def everything():
        out, gradient = random(tokens, width, seed=4, dtype=dtype), random(features, width, seed=5, dtype=dtype)
        rows = random(features, width, seed=6, dtype=dtype)
        sparse.add_decoded(out, kept, weight)
        by = sparse.ByFeature(kept)
        dots = by.decoder_gradients(grad, weight, scale, gradient, adds)
        by.rows(kept.values, grad, rows, adds)
        assert by.decoder_gradients(grad, weight, None, rows.clone(), adds, wants_dots=False) is None
        return out, gradient, dots, rows

    rtol = 1e-4 if dtype == torch.float32 else 1e-12
    for found, wanted in zip(everything(), in_torch(monkeypatch, everything), strict=True):
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_its_gradients(monkeypatch, dtype, terms):
    tokens, features = 150, 200
    h, grad = random(tokens, features, dtype=dtype), random(tokens, features, seed=1, dtype=dtype)
    theta, norm = random(features, seed=2).abs(), random(features, seed=3).abs()
    theta[:9] = h[0, :9].float()

    def everything():
        fired = torch.ones(features, dtype=torch.int64, device=DEVICE)
        out = gate.gate(h, theta, fired)
        through, sums = gate.gate_backward(h, grad.clone(), theta, norm, TERMS[terms])
        priced = TERMS[terms].price * sums.price
        return out, fired, through.float(), sums.bias, sums.theta, sums.norm, sums.pull, priced

    for found, wanted in zip(everything(), in_torch(monkeypatch, everything), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2 if found.shape == h.T.shape else 1e-4, atol=1e-4)


def test_sorting_by_feature_keeps_the_order_of_entries():
    features = torch.randint(0, 50, (500,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for n_features in (50, 2**15, 70_000):
        order, bounds = torch_sparse.sort_by_feature(features, n_features)
        assert torch.equal(order, features.argsort(stable=True))
        counts = torch.nn.functional.pad(torch.bincount(features, minlength=n_features).cumsum(0), (1, 0))
        assert torch.equal(bounds, counts)
