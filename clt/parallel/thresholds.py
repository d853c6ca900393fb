"""The kth largest of numbers that are spread over ranks, exactly, from counts alone.

Positive floating point numbers are ordered as their bits are. So the kth largest is found digit by digit, the most
significant first: all ranks count how many of their numbers have each value of the present digit, and the sum of the
counts says which value the kth largest has. Three rounds do for float32, six for float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from clt.models.activations import count_kept
from clt.parallel.collectives import Group

# Bits of a digit: the counts of one digit are 16 KiB.
_DIGIT = 11


def kth_largest(
    scores: Float[Tensor, "row entry"], k: float, n_tokens: int, n_candidates: int, group: Group
) -> Float[Tensor, " row"]:
    """For each row, its kth largest number over all ranks; never below the smallest positive one.

    Args:
        scores: this rank's, any number of entries.
        k: per token; times `n_tokens`, rounded up, is how many are kept of each row.
        n_tokens: of all ranks' batch.
        n_candidates: entries of a row, over all ranks.
        group: the ranks.
    """
    wanted = count_kept(k, n_tokens, n_candidates)
    if wanted <= 0:
        return scores.new_full((len(scores),), torch.inf)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    bits = wide.contiguous().view(torch.int64 if wide.dtype == torch.float64 else torch.int32)
    row, entry = (wide > 0).nonzero(as_tuple=True)
    numbers = bits[row, entry].long()
    found = _search(row, numbers, len(scores), wanted, 63 if wide.dtype == torch.float64 else 31, group)
    cut = found.to(bits.dtype).view(wide.dtype).to(scores.dtype)
    return cut.clamp_min(torch.finfo(scores.dtype).tiny)


def _search(
    row: Integer[Tensor, " entry"],
    numbers: Integer[Tensor, " entry"],
    n_rows: int,
    wanted: int,
    n_bits: int,
    group: Group,
) -> Integer[Tensor, " row"]:
    """Each row's `wanted`th largest of non-negative integers below 2^n_bits; 0 where there are fewer."""
    found = numbers.new_zeros(n_rows)
    left = numbers.new_full((n_rows,), wanted)
    shift = n_bits
    while shift > 0:
        width = min(_DIGIT, shift)
        shift -= width
        size = 1 << width
        digit = (numbers >> shift) & (size - 1)
        counts = torch.bincount(row * size + digit, minlength=n_rows * size).view(n_rows, size)
        group.sum_(counts, "batchtopk counts")
        at_least = counts.flip(1).cumsum(1).flip(1)
        chosen = ((at_least >= left[:, None]).sum(1) - 1).clamp_min(0)
        above = torch.where(chosen + 1 < size, at_least.gather(1, (chosen + 1).clamp_max(size - 1)[:, None])[:, 0], 0)
        found, left = (found << width) | chosen, left - above
        keep = digit == chosen[row]
        row, numbers = row[keep], numbers[keep]
    return found
