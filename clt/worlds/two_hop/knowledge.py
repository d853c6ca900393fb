"""The knowledge base: twelve states with four attributes each, and 72 cities with two-word names.

City (first word a, second word b) lies in state (a + b) mod 12: a Latin square, so neither word alone tells the
state. A two-hop question names a city and asks for an attribute of its state; the state is the hop in the middle,
never written down in the question or its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clt.worlds.base import Split


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


STATES = _words("Avalor Brenia Corvia Dalmar Estria Fenwick Galdor Harmond Istara Jorvik Kelmar Lorwen")
FIRST_WORDS = _words("Amber Bright Copper Dusk Ember Frost Golden Hollow Iron Jade Kings Lark")
SECOND_WORDS = _words("Bay Falls Harbour Mill Ridge Vale")
ATTRIBUTES = {
    "capital": _words("Arden Belmont Carrow Dunmore Elsworth Farrow Grimsby Halden Ingram Jarrow Kendal Lynford"),
    "bird": _words("robin falcon heron owl wren eagle finch raven swan crane stork kestrel"),
    "flower": _words("rose lily tulip daisy iris poppy violet lotus orchid aster peony jasmine"),
    "tree": _words("oak pine maple cedar birch willow aspen elm alder spruce walnut hazel"),
}
HELD_OUT = 57
"""Two-hop facts that are never in the training text, of 288."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One two-hop fact: the city's state is the known hop in the middle."""

    city: str
    relation: str
    state: str
    answer: str

    @property
    def prompt(self) -> str:
        """The sentence up to its last word."""
        return f"{self.city} is in the state whose {self.relation} is"


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A line of text, cut before the word that must be known."""

    id: str
    prompt: str
    answer: str


def cities() -> dict[str, str]:
    """Each city's state."""
    return {
        f"{first} {second}": STATES[(a + b) % len(STATES)]
        for a, first in enumerate(FIRST_WORDS)
        for b, second in enumerate(SECOND_WORDS)
    }


def attribute(state: str, relation: str) -> str:
    """The state's capital, bird, flower or tree."""
    return ATTRIBUTES[relation][STATES.index(state)]


def all_facts() -> list[Fact]:
    """Every two-hop fact, by city and relation."""
    return [
        Fact(city=city, relation=relation, state=state, answer=attribute(state, relation))
        for city, state in cities().items()
        for relation in ATTRIBUTES
    ]


def facts(split: Split) -> list[Fact]:
    """The two-hop facts of one split; which are held out never changes."""
    every = all_facts()
    held_out = set(np.random.default_rng(0).choice(len(every), HELD_OUT, replace=False).tolist())
    return [fact for place, fact in enumerate(every) if (place in held_out) == (split == "held_out")]


def one_hop_sentences() -> list[Sentence]:
    """Where each city lies and what each state has: everything needed to answer any two-hop question."""
    places = [Sentence(id=f"place/{city}", prompt=f"{city} is in", answer=state) for city, state in cities().items()]
    having = [
        Sentence(id=f"{relation}/{state}", prompt=f"The {relation} of {state} is", answer=attribute(state, relation))
        for state in STATES
        for relation in ATTRIBUTES
    ]
    return places + having


def sentences(split: Split) -> list[Sentence]:
    """The training text (one-hop facts and the two-hop facts of the split), or the held-out two-hop facts."""
    two_hop = [
        Sentence(id=f"two-hop/{fact.city}/{fact.relation}", prompt=fact.prompt, answer=fact.answer)
        for fact in facts(split)
    ]
    return two_hop if split == "held_out" else one_hop_sentences() + two_hop
