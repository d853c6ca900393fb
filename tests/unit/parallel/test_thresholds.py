"""The kth largest from counts is the one that sorting gives, ties and shortage included; also topk's ties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.models.activations import batch_threshold, count_kept, topk_indices
from clt.parallel.feature_shard import _best_scores, _winners
from clt.parallel.mesh import mesh_of_one
from clt.parallel.thresholds import kth_largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(tokens=st.integers(1, 6), features=st.integers(1, 40), k=st.floats(0, 60), seed=st.integers(0, 99))
def test_counting_digits_finds_what_sorting_finds(dtype, tokens, features, k, seed):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, tokens * features, generator=rng).to(dtype)
    scores[:, ::3] = scores[:, :1].clone()  # ties
    found = kth_largest(scores, k, tokens, tokens * features, mesh_of_one("cpu").world)
    kept = count_kept(k, tokens, tokens * features)
    assert found.tolist() == [float(batch_threshold(row, kept)) for row in scores]


@given(parts=st.integers(1, 5), k=st.integers(0, 9), features=st.integers(5, 30), seed=st.integers(0, 99))
def test_parts_of_a_dictionary_keep_together_what_one_keeps_also_in_ties(parts, k, features, seed):
    scores = torch.randint(0, 6, (4, features), generator=torch.Generator().manual_seed(seed)).double()
    k = min(k, features)
    cut = scores.tensor_split(parts, dim=1)
    shown = torch.stack([_best_scores(part, k) for part in cut])
    kept = torch.cat([_winners(part, shown, rank, k) for rank, part in enumerate(cut)], 1)
    assert kept.sum(1).tolist() == [k] * 4
    whole = torch.zeros_like(scores, dtype=torch.bool).scatter(1, topk_indices(scores, k), True)
    assert torch.equal(kept, whole)
    first = torch.zeros_like(whole).scatter(1, scores.sort(dim=1, descending=True, stable=True).indices[:, :k], True)
    assert torch.equal(whole, first), "of equal ones, the first"
