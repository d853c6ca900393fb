"""On a GPU, Triton's kernels and torch's operations give the gradients that autograd gives on a CPU."""

import pytest
import torch

from tests.explicit_steps import KINDS, assert_same_step, one_step, routes_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_route_gives_autograds_gradients_in_float64(monkeypatch, kernels, kind):
    monkeypatch.setenv("CLT_KERNELS", kernels)
    for window, options in (((0, None), "strong"), ((1, 2), "small parts")):
        plain = one_step("plain", kind, window, options, 3)
        for route in ["plain", *routes_of(kind, options)]:
            found = one_step(route, kind, window, options, 3, device="cuda")
            assert_same_step(plain, found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_wide_layers_agree_in_fp32(monkeypatch, kernels, kind):
    monkeypatch.setenv("CLT_KERNELS", kernels)
    shape = {"features": 300, "width": 70, "dtype": torch.float32}  # more than a block, and a rest, of both
    plain = one_step("plain", kind, (0, None), "strong", 3, **shape)
    for route in routes_of(kind, "strong"):
        found = one_step(route, kind, (0, None), "strong", 3, device="cuda", **shape)
        assert_same_step(plain, found, rtol=2e-4, atol=2e-5)
