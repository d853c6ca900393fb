"""The two-hop world: does a pruned graph hold the middle hop, and does changing it change the answer?

"CITY is in the state whose capital is" has one known hop in the middle: the city's state, computed at the city's second
word and moved to the end. Cities of one state share no word, so a feature that fires for several of them, and for few
others, has computed the state. It *stands for* the state at a position (counted from the second word) if there,
whatever is asked, it fires for at least three of the state's six cities, and these are at least two thirds of all
cities it fires for. This is looked up on all 72 cities and four relations, before any graph is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clt.attribution.attribute import attribute
from clt.attribution.faithfulness.host_runs import edited_logits
from clt.attribution.prune import PrunedGraph
from clt.replacement import ReplacementModel
from clt.types import Sample
from clt.worlds.two_hop.knowledge import ATTRIBUTES, STATES, cities
from clt.worlds.two_hop.knowledge import attribute as attribute_of

SHARE, FEWEST = 2 / 3, 3


class StateFeature(NamedTuple):
    """A feature that stands for a state at a position."""

    layer: int
    offset: int
    """Positions after the city's second word."""
    feature: int
    strength: float
    """Mean activation over the state's cities."""


def state_features(model: ReplacementModel) -> dict[str, list[StateFeature]]:
    """The features that stand for each state."""
    names = cities()
    # What fires whatever is asked: of each city, the least activation over the relations.
    by_city = torch.stack(
        [torch.stack([_from_second_word(model, city, what) for what in ATTRIBUTES]).amin(0) for city in names]
    )
    owner = torch.tensor([STATES.index(state) for state in names.values()])
    fires = by_city > 0
    found: dict[str, list[StateFeature]] = {}
    for number, state in enumerate(STATES):
        hits = fires[owner == number].sum(0)
        stands = (hits >= FEWEST) & (hits >= SHARE * fires.sum(0))
        strength = by_city[owner == number].mean(0)
        found[state] = [
            StateFeature(layer, offset, feature, float(strength[layer, offset, feature]))
            for layer, offset, feature in stands.nonzero().tolist()
        ]
    return found


def _from_second_word(model: ReplacementModel, city: str, relation: str) -> Float[Tensor, "layer offset feature"]:
    sample = Sample(id=city, prompt=f"{city} is in the state whose {relation} is")
    features = model.transcoder.encode(model.adapter.capture(model.adapter.prepare([sample])).inputs)
    return features[:, second_word(model, city) :]


def second_word(model: ReplacementModel, city: str) -> int:
    """Position of the last token of a city that begins the prompt."""
    return int(model.adapter.prepare([Sample(id=city, prompt=city)]).input_ids.shape[1]) - 1


def measure_middle_hop(model: ReplacementModel, questions: Sequence[Sample]) -> dict[str, Any]:
    """Shares of questions, and what changing the middle hop in the host does.

    `right_state`: the pruned graph holds a feature, where it stands for a state, that stands for the city's;
    `wrong_state`: one that stands for another state. `inhibited`: mean change of the answer's log-probability when the
    features of the right state are switched off in the host; `swapped`: share of questions whose answer becomes that
    of another state when its features are switched on instead.
    """
    known = state_features(model)
    rows = [_question(model, question, known) for question in questions]
    changed = [row for row in rows if row["inhibited"] is not None]
    swapped = [row for row in rows if row["swapped"] is not None]
    return {
        "n": len(rows),
        "states_with_a_feature": sum(bool(features) for features in known.values()),
        "right_state": _mean([row["right_state"] for row in rows]),
        "wrong_state": _mean([row["wrong_state"] for row in rows]),
        "replacement": _mean([row["replacement"] for row in rows]),
        "completeness": _mean([row["completeness"] for row in rows]),
        "largest_row_sum_error": max(row["row_sum_error"] for row in rows),
        "inhibited": _mean([row["inhibited"] for row in changed]),
        "swapped": _mean([row["swapped"] for row in swapped]),
        "n_changed": len(changed),
        "n_swapped": len(swapped),
    }


def _question(model: ReplacementModel, question: Sample, known: dict[str, list[StateFeature]]) -> dict[str, Any]:
    city, state = question.meta["city"], question.meta["state"]
    place = second_word(model, city)
    graph = attribute(model, question, max_feature_nodes=None)
    kept = _kept_features(graph.prune())
    right = {(each.layer, place + each.offset, each.feature) for each in known[state]}
    wrong = {
        (each.layer, place + each.offset, each.feature)
        for name, group in known.items()
        if name != state
        for each in group
    }
    row: dict[str, Any] = {
        "right_state": bool(kept & right),
        "wrong_state": bool(kept & wrong),
        "row_sum_error": graph.info["checks"]["row_sum_error"],
        **{name: getattr(graph.scores, name) for name in ("replacement", "completeness")},
        "inhibited": None,
        "swapped": None,
    }
    inputs = model.adapter.prepare([question])
    other = STATES[(STATES.index(state) + 5) % len(STATES)]
    if known[state]:
        answer = model.adapter.tokenizer(f" {question.meta['answer']}")["input_ids"][-1]  # pyright: ignore[reportOptionalCall]
        off = [(each.layer, place + each.offset, each.feature, 0.0) for each in known[state]]
        before, after = edited_logits(model, inputs, [[], off])
        row["inhibited"] = float(after.log_softmax(0)[answer] - before.log_softmax(0)[answer])
        if known[other]:
            on = [(each.layer, place + each.offset, each.feature, each.strength) for each in known[other]]
            swapped = edited_logits(model, inputs, [off + on])[0].argmax()
            wanted = model.adapter.tokenizer(  # pyright: ignore[reportOptionalCall]
                f" {attribute_of(other, question.meta['relation'])}"
            )["input_ids"][-1]
            row["swapped"] = int(swapped) == wanted
    return row


def _kept_features(pruned: PrunedGraph) -> set[tuple[int, ...]]:
    """Layer, position and feature of the features that pruning kept."""
    graph = pruned.graph
    return {tuple(place) for place in graph.features[pruned.node_mask[: graph.n_features]].tolist()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
