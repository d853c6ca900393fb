"""Learned gains: factors on chosen features, fitted so that bad spans become unlikely and good ones stay likely.

    loss = sum over tasks of mean over spans of weight * softplus(+-margin) + shrink * mean of (log gain)^2

with + for bad spans and - for good ones. A task's bad spans together weigh `bad_weight` times what its good ones do.
Nothing else of the model moves: it is steering, its doses found by descent instead of by a sweep. Once steered the
model gives other answers, with inventions of their own; so it answers the same questions again and learns from both.
The answers used here are selection answers; nothing reported comes from them.
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

from clt.config.base import Config, require_positive
from clt.discovery.effects import Example, span_margins
from clt.discovery.steering import Factor
from clt.errors import DiscoveryError
from clt.lm import HostInputs, ModelAdapter
from clt.replacement import Gains, ReplacementModel, SteeredHost
from clt.replacement.passes import PARTS
from clt.types import FeatureId

MOST_PREPARED_BYTES = 2**28
"""Of prepared inputs that are kept per task."""


@dataclass(frozen=True, kw_only=True)
class GainOptions(Config):
    """How gains are learned."""

    rounds: Annotated[int, tyro.conf.arg(name="gain-rounds")] = 2
    """Before every round but the first the questions are answered again, under the gains so far."""
    by_part: bool = True
    """Learn a gain for image positions, one for the rest of the prompt and one for the answer; False: one for all."""
    steps: Annotated[int, tyro.conf.arg(name="gain-steps")] = 100
    """Updates per round."""
    batch_size: Annotated[int, tyro.conf.arg(name="gain-batch-size")] = 48
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

    def __post_init__(self) -> None:
        require_positive("gains", rounds=self.rounds, steps=self.steps, batch_size=self.batch_size)


def learn_gains(
    model: ReplacementModel | SteeredHost,
    examples: Sequence[Example],
    chosen: Sequence[FeatureId],
    options: GainOptions,
    answer_again: Callable[[Gains], Sequence[Example]],
) -> dict[FeatureId, Factor]:
    """Factors for each of the chosen features.

    Args:
        model: what is to be steered by them: gains learned on the one are not the best for the other.
        examples: the model's answers without steering.
        answer_again: the model's answers to the same questions under gains.

    Raises:
        DiscoveryError: there are no bad or no good spans to learn from.
    """
    table = _GainTable(model, chosen, options)
    rng = np.random.default_rng(options.seed)
    _learn(model, _tasks(examples), table, options, rng)
    for _ in range(1, options.rounds):
        with torch.no_grad():
            given = answer_again(table.gains())
        _learn(model, _tasks([*examples, *given]), table, options, rng)
    return table.factors()


class _GainTable:
    """Log gains of the chosen features, one column each; a row per part, or one in all."""

    def __init__(
        self, model: ReplacementModel | SteeredHost, chosen: Sequence[FeatureId], options: GainOptions
    ) -> None:
        n_rows = len(PARTS) if options.by_part else 1
        config = model.transcoder.config
        self.log_gains = torch.zeros(n_rows, len(chosen), requires_grad=True)
        self._chosen = chosen
        self._limit = float(np.log(options.largest))
        layers, features = (torch.tensor(column) for column in zip(*chosen))
        self._at = (torch.arange(n_rows)[:, None], layers, features)
        self._ones = torch.ones(n_rows, config.num_layers, config.num_features)

    def _values(self) -> Float[Tensor, "part chosen"]:
        return self.log_gains.clamp(-self._limit, self._limit).exp()

    def gains(self) -> Gains:
        """Differentiable by the log gains."""
        by_layer = self._ones.index_put(self._at, self._values()).unbind(1)
        return Gains(dict(enumerate(by_layer)))

    def factors(self) -> dict[FeatureId, Factor]:
        """As plain numbers."""
        columns = self._values().detach().T.tolist()
        return {
            feature: tuple(column) if len(column) > 1 else column[0] for feature, column in zip(self._chosen, columns)
        }


def _learn(
    model: ReplacementModel | SteeredHost,
    tasks: Sequence[_Task],
    table: _GainTable,
    options: GainOptions,
    rng: np.random.Generator,
) -> None:
    """One round of updates."""
    optimiser = torch.optim.Adam([table.log_gains], lr=options.learning_rate, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps, options.learning_rate / 10)
    batches = [(_Batches(model.adapter, task.examples, options.batch_size, rng), task.bad_share) for task in tasks]
    late: list[Tensor] = []
    for step in range(options.steps):
        gains = table.gains()
        loss = options.shrink * table.log_gains.square().mean()
        for drawn, bad_share in batches:
            loss = loss + _loss(model, *drawn.draw(rng), gains, bad_share * options.bad_weight).cpu()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        if step >= options.steps // 2:
            late.append(table.log_gains.detach().clone())
    # Where single steps lead depends on their batches; the mean over the last half does so less.
    with torch.no_grad():
        table.log_gains.copy_(torch.stack(late).mean(0))


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
    """A task's answers dealt into batches once, and drawn in turns, each in another order; small ones stay prepared."""

    def __init__(self, adapter: ModelAdapter, examples: Sequence[Example], size: int, rng: np.random.Generator) -> None:
        order = rng.permutation(len(examples))
        n_batches = -(-len(examples) // size)
        self._adapter = adapter
        self._dealt = [[examples[place] for place in part] for part in np.array_split(order, n_batches)]
        self._turn: list[int] = []
        self._prepared: dict[int, HostInputs] = {}
        self._bytes = 0

    def draw(self, rng: np.random.Generator) -> tuple[Sequence[Example], HostInputs]:
        """One batch."""
        if not self._turn:
            self._turn = rng.permutation(len(self._dealt)).tolist()
        number = self._turn.pop()
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
    gains: Gains,
    bad_weight: float,
) -> Float[Tensor, ""]:
    """Weighted mean over the spans of a batch."""
    with model.active(inputs, interventions=gains):
        logits = model.adapter.model(**inputs.tensors, use_cache=False).logits
    margins = span_margins(logits, inputs, [each.spans for each in batch])
    prices = [bad_weight * softplus(margin) if is_bad else softplus(-margin) for margin, is_bad in margins]
    return torch.stack(prices).mean()
