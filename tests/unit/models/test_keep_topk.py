"""Of equal scores the first features are kept, whatever computes it: else routes and ranks would part ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.models.activations import topk_indices
from clt.models.kernels import build
from clt.models.kernels.sparse import keep_topk


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@given(
    features=st.sampled_from([1, 9, 300, 2000]),
    k=st.sampled_from([0, 1, 3, 16, 299, 5000]),
    scale=st.sampled_from(["none", "ones", "few", "zeros"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_of_equal_scores_the_first_are_kept(kernels, features, k, scale, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    h = torch.randint(-20, 20, (5, features), generator=rng).to(dtype)
    weights = {
        "none": None,
        "ones": torch.ones(features),
        "few": torch.randint(0, 3, (features,), generator=rng).float(),
        "zeros": torch.zeros(features),
    }[scale]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLT_KERNELS", kernels)
        build.library.cache_clear()
        kept = keep_topk(h, weights, k)
    build.library.cache_clear()
    scores = h.double() if weights is None else h.double() * weights
    k = min(k, features)
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    assert torch.equal(kept.features.view(5, k), expected)
    assert torch.equal(topk_indices(scores, k).sort(1).values, expected)
    assert torch.equal(kept.values.view(5, k).double(), h.double().gather(1, expected))
