"""On a GPU, an optimiser in the host's memory takes the steps of one on the device."""

import pytest
import torch

from clt.config import TrainingConfig
from clt.training import block_adam
from clt.training.optim import build_optimizer, optimizer_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "weight_decay": 0.1}, {"optimizer_state": "bf16"}])
def test_weights_and_moments_are_those_on_the_device(monkeypatch, options):
    monkeypatch.setattr(block_adam, "block_numbers", lambda is_gpu: 1 << 16)  # many blocks, each place used again
    ends = []
    for offloads in (False, True):
        rng = torch.Generator("cuda").manual_seed(0)
        weights = torch.randn(1_000_003, generator=rng, device="cuda")
        named = {"W_dec.0": torch.nn.Parameter(weights), "b_dec": torch.nn.Parameter(weights[:77].clone())}
        optimizer = build_optimizer(named, TrainingConfig(offload_optimizer=offloads, **options), 24)
        for _ in range(5):
            for parameter in named.values():
                parameter.grad = torch.randn(parameter.shape, generator=rng, device="cuda")
            optimizer.step()
        kept = optimizer_tensors(optimizer, named)
        assert kept["W_dec.0/exp_avg"].is_cuda is not offloads
        assert kept["W_dec.0/exp_avg"].is_pinned() is offloads
        ends.append({**named, **kept})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name].cpu(), value.cpu(), rtol=1e-6, atol=1e-7)
