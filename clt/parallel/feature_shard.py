"""A dictionary over several ranks: each holds some of its features, which is an ordinary smaller transcoder.

What is written to a layer is the sum over all ranks. What topk and batchtopk keep is decided by exchanging candidates'
scores or counts of scores, never the scores themselves, so that what ranks tell each other does not grow with the
dictionary (docs/parallel.md has the formula).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from clt.config import CLTConfig
from clt.errors import ConfigError
from clt.models.codes import Codes, SparseCodes
from clt.models.peers import Peers
from clt.models.slices import part_of
from clt.parallel.collectives import Group
from clt.parallel.mesh import Mesh
from clt.parallel.thresholds import kth_largest

# The same on every rank, but used feature by feature, so that each rank knows only its part of the gradient.
PARTIAL = frozenset({"V_dec"})


def shard_config(whole: CLTConfig, part: int, n_parts: int) -> CLTConfig:
    """What one rank holds, as a transcoder of its own.

    Raises:
        ConfigError: there are fewer features than ranks.
    """
    if whole.num_features < n_parts:
        raise ConfigError(
            f"CLTConfig.num_features = {whole.num_features} cannot be split over --tp {n_parts} ranks. Use more "
            "features, or fewer parts and more copies (--dp)."
        )
    features = len(part_of(whole.num_features, part, n_parts))
    changes: dict[str, Any] = {"num_features": features}
    layers = whole.num_layers
    if whole.topk_k is not None:
        changes["topk_k"] = min(whole.topk_count, features * (layers if whole.topk_mode == "global" else 1))
    if whole.batchtopk_k is not None:
        most = features * (layers if whole.batchtopk_mode == "global" else 1)
        changes["batchtopk_k"] = min(whole.batchtopk_k, most)
    return whole.replace(**changes)


class _Sum(torch.autograd.Function):
    """Sum over a group. Each rank goes on with the whole sum, so each rank's part has the sum's own gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group, purpose: str) -> Tensor:
        wide = torch.promote_types(part.dtype, torch.float32)
        return group.sum_(part.to(wide, copy=True).contiguous(), purpose).to(part.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


class Shards(Peers):
    """The other ranks of a mesh."""

    def __init__(self, whole: CLTConfig, mesh: Mesh) -> None:
        """Take this rank's place in the mesh."""
        super().__init__(whole)
        self._mesh = mesh
        self.first = part_of(whole.num_features, mesh.tp.rank, mesh.tp.size).start
        self.is_split = not mesh.tp.is_alone

    def sum(self, part: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Over the ranks with the same tokens."""
        if self._mesh.tp.is_alone:
            return part
        return _Sum.apply(part, self._mesh.tp, "reconstruction")  # pyright: ignore[reportReturnType]

    def join(self, part: Shaped[Tensor, "layer feature"]) -> Shaped[Tensor, "layer whole"]:
        """Side by side, in the order of the ranks."""
        tp = self._mesh.tp
        sizes = [len(part_of(self.whole.num_features, rank, tp.size)) for rank in range(tp.size)]
        every = tp.gather(pad(part, (0, max(sizes) - part.shape[1])), "features fired")
        return torch.cat([rows[:, :size] for rows, size in zip(every, sizes)], 1)

    def any(self, flags: Tensor) -> bool:
        """Whether one is set on a rank with the same tokens (those with the same features have the same flags)."""
        return self._mesh.tp.any(bool(flags.any()), "dead features", self._mesh.device)

    def best(
        self, h: Sequence[Float[Tensor, "token _"]], scores: Sequence[Float[Tensor, "token _"]], k: int
    ) -> Sequence[Codes]:
        """Every rank shows its own best k."""
        if self._mesh.tp.is_alone:
            return super().best(h, scores, k)
        k = min(k, self.whole.num_features)
        shown = self._mesh.tp.gather(torch.stack([_best_scores(score, k) for score in scores]), "topk candidates")
        masks = [_winners(score, shown[:, layer], self._mesh.tp.rank, k) for layer, score in enumerate(scores)]
        return [SparseCodes.from_mask(x.relu(), mask) for x, mask in zip(h, masks, strict=True)]

    def batch_tokens(self, n_tokens: int) -> int:
        """Over the copies of the dictionary."""
        return self._mesh.dp.total(n_tokens, "tokens", self._mesh.device)

    def total(self, count: int) -> int:
        """Over all ranks."""
        return self._mesh.world.total(count, "batchtopk candidates", self._mesh.device)

    def least(self, value: float) -> float:
        """Over all ranks."""
        box = torch.tensor([value], dtype=torch.float64, device=self._mesh.device)
        return float(self._mesh.world.gather(box, "batchtopk candidates").min())

    def cut_of_entries(
        self, scores: Float[Tensor, " entry"], k: float, n_tokens: int, n_candidates: int
    ) -> Float[Tensor, ""]:
        """Digit by digit, from counts over all ranks."""
        return kth_largest(scores[None], k, n_tokens, n_candidates, self._mesh.world)[0]

    def cut_per_token(self, scores: Float[Tensor, "token candidate"], k: int) -> Float[Tensor, "token 1"]:
        """Every rank shows its own best k."""
        k = min(k, self.whole.num_features * self.whole.num_layers)
        shown = self._mesh.tp.gather(_best_scores(scores, k), "topk candidates")
        return super().cut_per_token(_side_by_side(shown), k)

    def cut_of_batch(
        self, scores: Float[Tensor, "layer token feature"], k: float, together: bool
    ) -> Float[Tensor, " layer"]:
        """Digit by digit, from counts over all ranks: over all features and the whole batch."""
        layers, n_tokens = len(scores), self.batch_tokens(scores.shape[1])
        rows = scores.reshape(1, -1) if together else scores.flatten(1)
        n_candidates = n_tokens * self.whole.num_features * (layers if together else 1)
        return kth_largest(rows, k, n_tokens, n_candidates, self._mesh.world).expand(layers)


def _best_scores(scores: Float[Tensor, "token _"], k: int) -> Float[Tensor, "token k"]:
    """Of fewer than k, all, and -inf for the missing."""
    few = min(k, scores.shape[1])
    return pad(scores.topk(few, dim=1, sorted=False).values, (0, k - few), value=-torch.inf)


def _side_by_side(shown: Float[Tensor, "rank token k"]) -> Float[Tensor, "token candidate"]:
    return shown.transpose(0, 1).flatten(1)


def _winners(
    scores: Float[Tensor, "token _"], shown: Float[Tensor, "rank token k"], rank: int, k: int
) -> Bool[Tensor, "token _"]:
    """Which of this rank's features are among the best k of all; of equal ones the first, here as on one rank."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    every = _side_by_side(shown)
    cut = every.topk(k, dim=1).values[:, -1:]
    places = k - (every > cut).sum(1, keepdim=True) - (shown[:rank] == cut).sum((0, 2))[:, None]
    above, equal = scores > cut, scores == cut
    if bool((equal.sum(1, keepdim=True) > places).any()):
        equal &= equal.cumsum(1) <= places
    return above | equal
