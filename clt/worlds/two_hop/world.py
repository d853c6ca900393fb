"""The two-hop world as others use it: questions with a known middle hop, and the host that answers them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clt.errors import WorldError
from clt.types import Sample
from clt.worlds.base import Split, shipped_host, split_number
from clt.worlds.two_hop import knowledge


class TwoHopWorld:
    """`The capital of the state containing CITY`: ground truth for attribution."""

    name = "two-hop"
    summary = "a small knowledge base and a tiny Llama; the middle hop of every question is known"

    def host_path(self) -> Path:
        """Folder of the shipped Llama: weights (fp16 at rest), tokenizer, training record."""
        return shipped_host(self.name)

    def facts(self, split: Split | None = None) -> list[knowledge.Fact]:
        """The two-hop facts with their middle hop; of one split, or all 288."""
        return knowledge.all_facts() if split is None else knowledge.facts(split)

    def samples(self, split: Split, n: int, seed: int = 0) -> list[Sample]:
        """Up to `n` different sentences of the split's text (351 of `train`, 57 of `held_out`), shuffled."""
        text = knowledge.sentences(split)
        return [
            Sample(id=f"two-hop/{split}/{text[place].id}", prompt=text[place].prompt, answer=f" {text[place].answer}")
            for place in _shuffled(len(text), split, seed)[:n]
        ]

    def questions(self, split: Split, n: int, seed: int = 0) -> list[Sample]:
        """Up to `n` different two-hop questions (231 of `train`, 57 of `held_out`), shuffled.

        `meta` holds city, relation, the intermediate state and the answer; both are single tokens of the host's
        tokenizer when a space is put in front of them.
        """
        facts = knowledge.facts(split)
        return [_question(split, facts[place]) for place in _shuffled(len(facts), split, seed)[:n]]

    def score_questions(self, samples: Sequence[Sample], responses: Sequence[str]) -> dict[str, Any]:
        """Share of responses, in percent, whose first word is the answer."""
        if len(samples) != len(responses):
            raise WorldError(f"{len(responses):,} responses for {len(samples):,} samples. Each needs one, in order.")
        right = sum(
            response.split()[:1] == [sample.meta["answer"]]
            for sample, response in zip(samples, (text.replace(".", " ") for text in responses))
        )
        return {"accuracy": 100.0 * right / len(samples) if samples else 0.0, "n": len(samples)}


def _question(split: Split, fact: knowledge.Fact) -> Sample:
    return Sample(
        id=f"two-hop/{split}/question/{fact.city}/{fact.relation}",
        prompt=fact.prompt,
        meta={"city": fact.city, "relation": fact.relation, "state": fact.state, "answer": fact.answer},
    )


def _shuffled(n: int, split: Split, seed: int) -> list[int]:
    return np.random.default_rng((split_number(split), seed)).permutation(n).tolist()
