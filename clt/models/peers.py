"""Where a step needs the whole dictionary: one sum, and the choice of what topk and batchtopk keep.

A transcoder may hold only some of a dictionary's features, and only some of a batch's tokens; then others, its peers,
hold the rest. The mathematics asks its peers and does not know who they are: here there are none, in clt/parallel they
are other processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from clt.config import CLTConfig
from clt.models.activations import batch_threshold, count_kept, topk_indices
from clt.models.codes import Codes, SparseCodes


class Peers:
    """None: the dictionary and the batch are all here."""

    first = 0
    """Place of the first feature held here in the whole dictionary."""

    is_split = False
    """Whether others hold other features, so that what is written to a layer is a sum over ranks."""

    def __init__(self, whole: CLTConfig) -> None:
        """Take the configuration of the whole dictionary."""
        self.whole = whole

    def sum(self, part: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Over the whole dictionary; its gradient belongs to every part."""
        return part

    def join(self, part: Shaped[Tensor, "layer feature"]) -> Shaped[Tensor, "layer whole"]:
        """What is known of each feature held here, for the whole dictionary."""
        return part

    def any(self, flags: Tensor) -> bool:
        """Whether one is set, anywhere."""
        return bool(flags.any())

    def best(
        self, h: Sequence[Float[Tensor, "token _"]], scores: Sequence[Float[Tensor, "token _"]], k: int
    ) -> Sequence[Codes]:
        """In each layer the k features of each token with the highest scores, rectified; ties go to the first."""
        chosen = [topk_indices(score, k) for score in scores]
        return [SparseCodes.from_topk(x.gather(1, at).relu(), at, x.shape[1]) for x, at in zip(h, chosen, strict=True)]

    def batch_tokens(self, n_tokens: int) -> int:
        """Tokens of the whole batch, of which so many are here."""
        return n_tokens

    def total(self, count: int) -> int:
        """Of everybody."""
        return count

    def least(self, value: float) -> float:
        """Of everybody's values."""
        return value

    def cut_of_entries(
        self, scores: Float[Tensor, " entry"], k: float, n_tokens: int, n_candidates: int
    ) -> Float[Tensor, ""]:
        """As `cut_of_batch`, from scores that are above a bar and enough.

        Args:
            scores: of the entries found here.
            k: per token.
            n_tokens: of the whole batch.
            n_candidates: how many scores there are, above the bar or not.
        """
        tiny = torch.finfo(scores.dtype).tiny
        wanted = count_kept(k, n_tokens, n_candidates)
        if wanted <= 0:
            return scores.new_full((), torch.inf)
        if wanted > len(scores):
            return scores.new_full((), tiny)
        place = len(scores) - wanted
        # On a GPU kthvalue works with a single block of threads.
        cut = scores.sort().values[place] if scores.is_cuda else scores.kthvalue(place + 1).values
        return cut.clamp_min(tiny)

    def cut_per_token(self, scores: Float[Tensor, "token candidate"], k: int) -> Float[Tensor, "token 1"]:
        """Each token's kth highest score."""
        return scores.topk(min(k, scores.shape[1]), dim=1).values[:, -1:]

    def cut_of_batch(
        self, scores: Float[Tensor, "layer token feature"], k: float, together: bool
    ) -> Float[Tensor, " layer"]:
        """The smallest score that is kept when so many per token are, on average over the batch.

        Args:
            scores: of all candidates.
            k: per token.
            together: choose over all layers, not within each.
        """
        layers, tokens, features = scores.shape
        if together:
            return batch_threshold(scores, count_kept(k, tokens, scores.numel())).expand(layers)
        return torch.stack([batch_threshold(score, count_kept(k, tokens, tokens * features)) for score in scores])
