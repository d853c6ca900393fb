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
from clt.discovery.effects import Example, Gains, span_margins
from clt.errors import DiscoveryError
from clt.lm import HostInputs, ModelAdapter
from clt.replacement import ReplacementModel, SteeredHost
from clt.types import FeatureId

MOST_PREPARED_BYTES = 2**28
"""Of prepared inputs that are kept per task."""


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
    seed: Annotated[int, tyro.conf.arg(name="gain-seed")] = 0
    """Of the batches."""


def learn_gains(
    model: ReplacementModel | SteeredHost,
    examples: Sequence[Example],
    chosen: Sequence[FeatureId],
    options: GainOptions,
    on_step: Callable[[], None] = lambda: None,
) -> dict[FeatureId, float]:
    """A factor for each of the chosen features.

    Args:
        model: what is to be steered by them: gains learned on the one are not the best for the other.

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
    batches = [(_Batches(model.adapter, task.examples, options.batch_size, rng), task.bad_share) for task in tasks]
    ones = torch.ones(config.num_layers, config.num_features)
    for _ in range(options.steps):
        gains = ones.index_put(at, log_gains.clamp(-limit, limit).exp())
        loss = options.shrink * log_gains.square().mean()
        for drawn, bad_share in batches:
            loss = loss + _loss(model, *drawn.draw(rng), gains, bad_share * options.bad_weight).cpu()
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


class _Batches:
    """A task's answers dealt into batches once, and drawn one at a time; small ones stay prepared."""

    def __init__(self, adapter: ModelAdapter, examples: Sequence[Example], size: int, rng: np.random.Generator) -> None:
        order = rng.permutation(len(examples))
        n_batches = -(-len(examples) // size)
        self._adapter = adapter
        self._dealt = [[examples[place] for place in part] for part in np.array_split(order, n_batches)]
        self._prepared: dict[int, HostInputs] = {}
        self._bytes = 0

    def draw(self, rng: np.random.Generator) -> tuple[Sequence[Example], HostInputs]:
        """One batch."""
        number = int(rng.integers(len(self._dealt)))
        batch = self._dealt[number]
        if number in self._prepared:
            return batch, self._prepared[number]
        inputs = self._adapter.prepare([each.sample for each in batch], answers=[each.answer for each in batch])
        size = sum(tensor.nbytes for tensor in inputs.tensors.values())
        if self._bytes + size <= MOST_PREPARED_BYTES:
            self._prepared[number], self._bytes = inputs, self._bytes + size
        return batch, inputs


def _loss(
    model: ReplacementModel | SteeredHost,
    batch: Sequence[Example],
    inputs: HostInputs,
    gains: Float[Tensor, "layer feature"],
    bad_weight: float,
) -> Float[Tensor, ""]:
    """Weighted mean over the spans of a batch."""
    per_row = gains[:, None].expand(-1, len(batch), -1).to(model.adapter.device)
    with model.active(inputs, interventions=Gains(per_row)):
        logits = model.adapter.model(**inputs.tensors, use_cache=False).logits
    margins = span_margins(logits, inputs, [each.spans for each in batch])
    prices = [bad_weight * softplus(margin) if is_bad else softplus(-margin) for margin, is_bad in margins]
    return torch.stack(prices).mean()
