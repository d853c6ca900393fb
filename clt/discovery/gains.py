"""Learned gains: factors on chosen features, fitted so that bad spans become unlikely and good ones stay likely.

    loss = sum over tasks of mean over spans of weight * softplus(+-margin) + shrink * mean of (log gain)^2

with + for bad spans and - for good ones. A task's bad spans together weigh `bad_weight` times what its good ones do.
Nothing else of the model moves: it is steering, its doses found by descent instead of by a sweep. The answers used
here are selection answers; nothing reported comes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from clt.config.base import Config
from clt.discovery.effects import Example, forward, span_margins
from clt.errors import DiscoveryError
from clt.replacement import ReplacementModel
from clt.types import FeatureId


@dataclass(frozen=True, kw_only=True)
class GainOptions(Config):
    """How gains are learned."""

    steps: Annotated[int, tyro.conf.arg(name="gain-steps")] = 150
    """Updates."""
    batch_size: Annotated[int, tyro.conf.arg(name="gain-batch-size")] = 64
    """Answers of each task per update."""
    learning_rate: Annotated[float, tyro.conf.arg(name="gain-learning-rate")] = 0.1
    """Of Adam, on log gains; falls to a tenth along a cosine."""
    bad_weight: float = 0.6
    """What losing bad spans counts against keeping good ones; more removes more and costs more coverage."""
    shrink: float = 0.05
    """Pull of the log gains towards 0."""
    largest: float = 20.0
    """Gains stay between 1 / largest and largest."""
    keep_errors: bool = True
    """Learn on the host's forward pass (transcoder errors kept) instead of the replacement's."""
    seed: Annotated[int, tyro.conf.arg(name="gain-seed")] = 0
    """Of the batches."""


def learn_gains(
    model: ReplacementModel,
    examples: Sequence[Example],
    chosen: Sequence[FeatureId],
    options: GainOptions,
    on_step: Callable[[], None] = lambda: None,
) -> dict[FeatureId, float]:
    """A factor for each of the chosen features.

    Raises:
        DiscoveryError: there are no bad or no good spans to learn from.
    """
    tasks = _tasks(examples)
    config = model.transcoder.config
    at = tuple(torch.tensor(column) for column in zip(*chosen))
    log_gains = torch.zeros(len(chosen), requires_grad=True)
    optimiser = torch.optim.Adam([log_gains], lr=options.learning_rate, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps, options.learning_rate / 10)
    limit = float(np.log(options.largest))
    rng = np.random.default_rng(options.seed)
    ones = torch.ones(config.num_layers, config.num_features)
    for _ in range(options.steps):
        gains = ones.index_put(at, log_gains.clamp(-limit, limit).exp())
        loss = options.shrink * log_gains.square().mean()
        for task in tasks:
            picked = rng.choice(len(task.examples), size=min(options.batch_size, len(task.examples)), replace=False)
            batch = [task.examples[place] for place in picked]
            loss = loss + _loss(model, batch, gains, task.bad_share * options.bad_weight, options.keep_errors).cpu()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        on_step()
    final = log_gains.detach().clamp(-limit, limit).exp().tolist()
    return dict(zip(chosen, final))


@dataclass(frozen=True)
class _Task:
    examples: Sequence[Example]
    bad_share: float
    """Good spans per bad span: what a bad one weighs at equal total weights."""


def _tasks(examples: Sequence[Example]) -> list[_Task]:
    by_name: dict[str, list[Example]] = {}
    for each in examples:
        if each.spans:
            by_name.setdefault(each.task, []).append(each)
    tasks = []
    for own in by_name.values():
        bad = sum(span.is_bad for each in own for span in each.spans)
        good = sum(not span.is_bad for each in own for span in each.spans)
        if not bad or not good:
            raise DiscoveryError(f"{len(own)} answers have {bad} bad and {good} good spans; gains need both.")
        tasks.append(_Task(own, good / bad))
    if not tasks:
        raise DiscoveryError(f"None of {len(examples)} answers has a span to learn gains from.")
    return tasks


def _loss(
    model: ReplacementModel,
    batch: Sequence[Example],
    gains: Float[Tensor, "layer feature"],
    bad_weight: float,
    keep_errors: bool,
) -> Float[Tensor, ""]:
    """Weighted mean over the spans of a batch."""
    inputs = model.adapter.prepare([each.sample for each in batch], answers=[each.answer for each in batch])
    per_row = gains[:, None].expand(-1, len(batch), -1).to(model.adapter.device)
    logits = forward(model, inputs, per_row, keep_errors)
    margins = span_margins(logits, inputs, [each.spans for each in batch])
    prices = [bad_weight * softplus(margin) if is_bad else softplus(-margin) for margin, is_bad in margins]
    return torch.stack(prices).mean()
