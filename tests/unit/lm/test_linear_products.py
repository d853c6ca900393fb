"""Leaving out what is zero changes no value and no gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.lm import patterns, products
from clt.lm.patterns import Pattern
from clt.lm.products import product

MASKS = {
    "causal": lambda to, at: at <= to,
    "sliding window": lambda to, at: (at <= to) & (at > to - 4),
    "image tokens see each other": lambda to, at: (at <= to) | ((at < 9) & (to < 9) & (at > 2) & (to > 2)),
    "nothing": lambda to, at: at < 0,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_pattern_in_blocks_moves_what_the_dense_one_moves(mask, kv_heads, monkeypatch):
    monkeypatch.setattr(patterns, "_BLOCK_ROWS", 5)
    rng = torch.Generator().manual_seed(0)
    dense = torch.rand(1, 4, 13, 13, generator=rng, dtype=torch.float64)
    dense = dense * MASKS[mask](torch.arange(13)[:, None], torch.arange(13))
    values = torch.randn(3, kv_heads, 13, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    # Rows that nothing reads, as positions after the one that is explained.
    gradient = torch.randn(3, 4, 13, 6, generator=rng, dtype=torch.float64)
    gradient[:, :, 7:] = 0

    moved = Pattern.of(dense).move(values)
    plain = dense @ values.repeat_interleave(4 // kv_heads, dim=1)
    torch.testing.assert_close(moved, plain)
    (ours,), (theirs,) = (torch.autograd.grad(each, values, gradient) for each in (moved, plain))
    torch.testing.assert_close(ours, theirs)


def test_a_long_causal_pattern_takes_little_more_than_half(monkeypatch):
    monkeypatch.setattr(patterns, "_BLOCK_ROWS", 8)
    dense = torch.rand(1, 2, 64, 64).tril()
    assert Pattern.of(dense).n_bytes == dense.numel() * 4 * (1 + 8 / 64) / 2


@given(
    rows=st.lists(st.booleans(), min_size=6, max_size=6),
    columns=st.lists(st.booleans(), min_size=9, max_size=9),
    has_bias=st.booleans(),
)
def test_a_product_passes_back_what_autograd_does(rows, columns, has_bias):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((4, 9), (9,)))
    gradient = torch.randn(2, 3, 9, generator=rng, dtype=torch.float64)
    gradient = gradient * torch.tensor(rows).view(2, 3, 1) * torch.tensor(columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_SMALL", 0)
        ours = product(x, weight, bias if has_bias else None)
        plain = x @ weight + (bias if has_bias else 0)
        torch.testing.assert_close(ours, plain)
        for each in (ours, plain):
            x.grad = None
            each.backward(gradient)
            torch.testing.assert_close(x.grad, gradient @ weight.T)
