"""Which activations topk and batchtopk keep, found a layer at a time: never are all layers' scores there together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from clt.models import CrossLayerTranscoder
from clt.models.activations import count_kept
from clt.models.kernels.sparse import Kept

# Where batchtopk looks first: above this share of what the cut is expected to be. It has to look again, lower down,
# if that was too high a bar.
_MARGIN = 0.8
# Tokens from which the cut is guessed while none is known.
_SAMPLE = 64
# By which it is multiplied, time after time, until enough lie above it.
_LOWER = (0.7, 0.5, 0.25, 0.0)

Norms = Sequence[Float[Tensor, " feature"] | None]


@runtime_checkable
class Encoder(Protocol):
    """What computes the layers, one at a time; may be asked for a layer more than once."""

    def preactivation(self, source: int) -> Tensor:
        """h, `[token, feature]`."""
        ...

    def best(self, source: int, scale: Tensor | None, k: int) -> Kept:
        """The k entries of each token with the largest h * scale."""
        ...

    def above(self, source: int, scale: Tensor | None, bound: Tensor) -> tuple[Kept, Tensor]:
        """The entries with h * scale above a bound, and their scores."""
        ...


def keep(model: CrossLayerTranscoder, encoder: Encoder, norms: Norms, k_factor: float) -> list[Kept]:
    """What every layer keeps, with h as values.

    Args:
        model: says how to choose.
        encoder: computes h of a layer.
        norms: what the ranking multiplies h with, or None.
        k_factor: how many times the configured k is kept.
    """
    config = model.config
    if config.activation_fn == "batchtopk":
        return _batchtopk(model, encoder, norms, k_factor)
    k = round(config.topk_count * k_factor)
    layers = range(config.num_layers)
    if config.topk_mode == "per_layer":
        return [encoder.best(layer, norms[layer], k) for layer in layers]
    return _best_of_all_layers([encoder.best(layer, norms[layer], k) for layer in layers], norms, k)


def scores_of(kept: Kept, norm: Float[Tensor, " feature"] | None) -> Float[Tensor, " entry"]:
    """What the entries are ranked by."""
    return kept.values if norm is None else kept.values * norm[kept.features].to(kept.values.dtype)


def _best_of_all_layers(candidates: Sequence[Kept], norms: Norms, k: int) -> list[Kept]:
    """Of each layer's best k, the k best of each token."""
    n_tokens = len(candidates[0].offsets) - 1
    scores = [scores_of(*pair) for pair in zip(candidates, norms)]
    every = torch.cat([score.view(n_tokens, -1) for score in scores], 1)
    cut = every.topk(min(k, every.shape[1]), dim=1).values[:, -1].clamp_min(torch.finfo(every.dtype).tiny)
    return [kept.where(~(score < cut[kept.tokens])) for kept, score in zip(candidates, scores)]


def _batchtopk(model: CrossLayerTranscoder, encoder: Encoder, norms: Norms, k_factor: float) -> list[Kept]:
    config = model.config
    k, layers = (config.batchtopk_k or 0) * k_factor, list(range(config.num_layers))
    together = config.batchtopk_mode == "global"
    groups = [layers] if together else [[layer] for layer in layers]
    kept: list[Kept] = []
    cuts = torch.zeros_like(model.running_threshold)
    for group in groups:
        best, cut = _best_of_batch(model, group, encoder, norms, k)
        kept += best
        cuts[group] = cut.to(cuts)
    model.remember_threshold(cuts)
    return kept


def _best_of_batch(
    model: CrossLayerTranscoder, group: Sequence[int], encoder: Encoder, norms: Norms, k: float
) -> tuple[list[Kept], Tensor]:
    """The best entries of all tokens of some layers, k per token on average, and the smallest score among them.

    Candidates lie above a bar that is first set a little below the cut expected; if they are too few, it is lowered.
    """
    peers, like = model.peers, model.b_enc[group[0]].detach()
    # Not the running threshold if there is a last one: while features grow it lags, and candidates become many times
    # what is kept.
    expected = model.running_threshold if model.last_cut is None else model.last_cut
    bar = _MARGIN * float(expected[group[0]])
    if not bar > 0:  # a NaN, too
        bar = peers.least(_guess(encoder.preactivation(group[0]), norms[group[0]], k / len(group)))
    found, scores = _above(bar, group, encoder, norms, like)
    n_tokens = peers.batch_tokens(len(found[0][0].offsets) - 1)
    n_candidates = n_tokens * peers.whole.num_features * len(group)
    for factor in _LOWER:
        if peers.total(len(scores)) >= count_kept(k, n_tokens, n_candidates) or bar == 0:
            break
        bar *= factor
        found, scores = _above(bar, group, encoder, norms, like)
    cut = peers.cut_of_entries(scores, k, n_tokens, n_candidates)
    return [kept.where(~(score < cut)) for kept, score in found], cut


def _above(
    bar: float, group: Sequence[int], encoder: Encoder, norms: Norms, like: Tensor
) -> tuple[list[tuple[Kept, Tensor]], Tensor]:
    """The entries of some layers with scores above a bar, and all their scores."""
    found = [encoder.above(layer, norms[layer], torch.full_like(like, bar)) for layer in group]
    return found, torch.cat([score for _, score in found])


def _guess(h: Float[Tensor, "token feature"], norm: Float[Tensor, " feature"] | None, k: float) -> float:
    """A bar from some tokens of one layer, low enough to lie below the cut of most data."""
    sample = h[:_SAMPLE].to(torch.promote_types(h.dtype, torch.float32))
    scores = (sample if norm is None else sample * norm.to(sample.dtype)).reshape(-1)
    wanted = min(max(1, round(2 * k * len(sample))), len(scores))
    return max(0.0, float(scores.topk(wanted).values[-1]))
