"""What batchtopk keeps does not depend on where it looks first."""

import pytest
import torch

from clt.training import keeping
from tests.explicit_steps import batch_of, engine_of, model_of


@pytest.mark.parametrize("kind", ["batchtopk", "batchtopk per layer", "batchtopk few", "batchtopk all"])
@pytest.mark.parametrize("expected", [None, 0.0, 1e-9, 1e9, torch.nan])
def test_the_same_is_kept_wherever_the_cut_was_expected(kind, expected):
    found = []
    for first in (None, expected):
        model = model_of(kind, features=40, seed=1)
        model.last_cut = None if first is None else torch.full((3,), first, dtype=torch.float64)
        result = engine_of(model, "sparse").step(batch_of(model), 0, torch.zeros(3, 40, dtype=torch.bool))
        found.append((result.fired, result.losses.total, model.last_cut, model.running_threshold))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_bar_follows_growing_features(monkeypatch):
    """The running threshold lags behind then, and candidates would become many times what is kept."""
    bars, look = [], keeping._above
    monkeypatch.setattr(keeping, "_above", lambda bar, *rest: bars.append(bar) or look(bar, *rest))
    model = model_of("batchtopk", features=300, width=20)
    engine, batch = engine_of(model, "sparse", learning_rate=1e-9), batch_of(model, tokens=100)
    for step in range(20):
        engine.step(batch, step, torch.zeros(3, 300, dtype=torch.bool))
        assert len(bars) == step + 1, "one look is enough"
        cut = float(model.last_cut[0])
        with torch.no_grad():
            for weight in [*model.W_enc, *model.b_enc]:
                weight *= 1.15
    assert bars[-1] > 0.65 * cut
    assert float(model.running_threshold[0]) < 0.3 * cut
