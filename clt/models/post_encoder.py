"""What happens to an active feature on its way to one target: an offset is added, then a scale multiplies.

    a'_{s->t} = (a_s + offset) * scale    where a_s is not 0, else 0

Offset and scale belong to the target (crosslayer-coding: `feature_offset`, `feature_scale`) or to the pair of source
and target (EleutherAI: `post_enc`, `post_enc_scale`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from clt.config import CLTConfig

# A shared decoder is learned from its nearest target; what it adds elsewhere starts small, but never at zero, where
# neither it nor its scale would get a gradient (crosslayer-coding's value).
_FAR_SCALE = 0.1


class PostEncoder:
    """Offsets and scales of all (source, target) pairs; either may be missing."""

    def __init__(self, config: CLTConfig, offsets: nn.ParameterList | None, scales: nn.ParameterList | None) -> None:
        """Look at parameters owned by a transcoder: per target `[feature]`, or per source `[target, feature]`."""
        self._config, self._offsets, self._scales = config, offsets, scales

    @property
    def is_identity(self) -> bool:
        """Whether activations reach every target as they are."""
        return self._offsets is None and self._scales is None

    def offset(self, source: int, features: Integer[Tensor, " kept"] | None = None) -> Float[Tensor, "target _"] | None:
        """What is added to the active features of one source, for each of its targets."""
        return self._rows(self._offsets, source, features)

    def scale(self, source: int, features: Integer[Tensor, " kept"] | None = None) -> Float[Tensor, "target _"] | None:
        """What multiplies the features of one source, for each of its targets."""
        return self._rows(self._scales, source, features)

    def _rows(self, values: nn.ParameterList | None, source: int, features: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if self._config.post_encoder == "pair":
            rows = values[source]
        else:
            targets = self._config.targets_of(source)
            rows = torch.stack([values[t] for t in targets]) if targets else values[0].new_zeros(0, len(values[0]))
        return rows if features is None else rows[:, features]


def initial_offsets(config: CLTConfig, like: Tensor) -> list[Tensor]:
    """Zero."""
    return [torch.zeros_like(scale) for scale in initial_scales(config, like)]


def initial_scales(config: CLTConfig, like: Tensor) -> list[Tensor]:
    """One; but 0.1 from a tied decoder to targets further away than its nearest (see `_FAR_SCALE`)."""
    far = 1.0 if config.decoder_tying == "none" else _FAR_SCALE
    layers, features = range(config.num_layers), config.num_features
    if config.post_encoder == "target":
        starts = [far if len(config.sources_of(target)) > 1 else 1.0 for target in layers]
        return [like.new_full((features,), start) for start in starts]
    scales = [like.new_full((len(config.targets_of(s)), features), far) for s in layers]
    for scale in scales:
        scale[:1] = 1.0
    return scales
