"""Learned gains: factors on chosen features, fitted so that bad spans become unlikely and good ones stay likely.

    loss = mean over bad spans of softplus(margin) + good_weight * mean over good spans of softplus(-margin)
         + shrink * mean over chosen features of (log gain)^2

Nothing else of the model moves, and with `shrink` most gains stay near 1: it is steering, its doses found by descent
instead of by a sweep. Samples used here are selection samples; nothing reported comes from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clt.discovery.effects import Example, forward, span_margins
from clt.errors import DiscoveryError
from clt.replacement.steerable import Steerable
from clt.types import FeatureId


@dataclass(frozen=True, kw_only=True)
class GainOptions:
    """How gains are learned."""

    steps: int = 100
    """Updates."""
    batch_size: int = 64
    """Answers per update."""
    learning_rate: float = 0.05
    """Of Adam, on log gains."""
    good_weight: float = 3.0
    """How much keeping good spans counts against losing bad ones."""
    shrink: float = 0.1
    """Pull of the log gains towards 0."""
    largest: float = 8.0
    """Gains stay between 1 / largest and largest."""
    seed: int = 0
    """Of the batches."""


def learn_gains(
    model: Steerable,
    examples: Sequence[Example],
    chosen: Sequence[FeatureId],
    n_layers: int,
    n_features: int,
    options: GainOptions,
) -> dict[FeatureId, float]:
    """A factor for each of the chosen features.

    Raises:
        DiscoveryError: there are no spans to learn from.
    """
    useful = [each for each in examples if each.spans]
    if not useful or not any(span.is_bad for each in useful for span in each.spans):
        raise DiscoveryError(f"None of {len(examples)} answers has a bad span, so there is nothing to learn gains from.")
    layers = torch.tensor([feature.layer for feature in chosen])
    features = torch.tensor([feature.feature for feature in chosen])
    log_gains = torch.zeros(len(chosen), requires_grad=True)
    optimiser = torch.optim.Adam([log_gains], lr=options.learning_rate, betas=(0.9, 0.98))
    limit = float(np.log(options.largest))
    rng = np.random.default_rng(options.seed)
    ones = torch.ones(n_layers, n_features)
    for _ in range(options.steps):
        picked = rng.choice(len(useful), size=min(options.batch_size, len(useful)), replace=False)
        gains = ones.index_put((layers, features), log_gains.clamp(-limit, limit).exp())
        loss = _loss(model, [useful[place] for place in picked], gains, options.good_weight)
        loss = loss + options.shrink * log_gains.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    final = log_gains.detach().clamp(-limit, limit).exp().tolist()
    return dict(zip(chosen, final))


def _loss(
    model: Steerable, batch: Sequence[Example], gains: Float[Tensor, "layer feature"], good_weight: float
) -> Float[Tensor, ""]:
    inputs = model.adapter.prepare([each.sample for each in batch], answers=[each.answer for each in batch])
    per_row = gains[:, None].expand(-1, len(batch), -1).to(model.adapter.device)
    margins = span_margins(forward(model, inputs, per_row), inputs, [each.spans for each in batch])
    bad = [margin for margin, is_bad in margins if is_bad]
    good = [margin for margin, is_bad in margins if not is_bad]
    loss = torch.zeros((), device=model.adapter.device)
    if bad:
        loss = loss + torch.nn.functional.softplus(torch.stack(bad)).mean()
    if good:
        loss = loss + good_weight * torch.nn.functional.softplus(-torch.stack(good)).mean()
    return loss
