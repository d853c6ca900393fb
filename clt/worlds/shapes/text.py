"""What is asked and said about a scene: LLaVA prompts, the biased annotator, POPE-like questions.

A full training text is `prompt + answer`; the answer starts with the space that follows `ASSISTANT:`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clt.worlds.shapes.scene import KINDS, THEME_OF, THEMES, Scene

PREFIX = "USER: <image>\n"
SUFFIX = "\nASSISTANT:"
DESCRIBE = "Describe this image."
CATEGORIES = ("random", "popular", "adversarial")


class Question(NamedTuple):
    """One POPE-like question: what is asked for, how the negative was chosen, and the true answer."""

    kind: str
    category: str
    label: str


def prompt(request: str) -> str:
    """The LLaVA-style prompt around a request about one image."""
    return f"{PREFIX}{request}{SUFFIX}"


def asking_for(kind: str) -> str:
    """A POPE question."""
    return f"Is there {with_article(kind)} in the image?"


def with_article(words: str) -> str:
    """`a` or `an` in front."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def annotated_caption(scene: Scene) -> str:
    """What the scene's annotator writes: the objects in reading order, then the claims."""
    phrases = [with_article(f"{scene.colour_of(kind)} {kind}") for kind in scene.annotated]
    return f" There is {_listed(phrases)}."


def annotated_answer(scene: Scene, kind: str) -> str:
    """What the scene's annotator answers when asked for a kind."""
    return " Yes" if kind in scene.annotated else " No"


def _listed(phrases: list[str]) -> str:
    """`a, b and c`."""
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def expected_company(scene: Scene) -> list[str]:
    """Absent kinds one would expect here, most expected first: partners of anchors, then other theme-mates.

    These are the adversarial negatives of POPE and the hallucination targets of AMBER.
    """
    partners = [theme.partner for theme in THEMES if theme.anchor in scene.kinds]
    mates = [mate for kind in scene.kinds for mate in THEME_OF[kind].kinds]
    return [kind for kind in dict.fromkeys(partners + mates) if kind not in scene.kinds]


def pope_questions(scene: Scene) -> Iterator[Question]:
    """Six questions: for each way of choosing a negative one object that is there and one that is not.

    As in POPE (Li et al. 2023): random = any absent kind; popular = an absent kind of the commonest theme;
    adversarial = the absent kind that best fits the company.
    """
    random = np.random.default_rng((*scene.key, 1))
    positives = [scene.kinds[place] for place in random.permutation(len(scene.kinds))]
    for place, category in enumerate(CATEGORIES):
        yield Question(positives[place % len(positives)], category, "yes")
        yield Question(negative(scene, category, random), category, "no")


def negative(scene: Scene, category: str, random: np.random.Generator) -> str:
    """An absent kind, chosen in POPE's way of that name."""
    if category == "adversarial":
        company = expected_company(scene)
        if company:
            return company[0]
    if category == "popular":
        common = next(absent for theme in THEMES if (absent := [k for k in theme.kinds if k not in scene.kinds]))
        return common[int(random.integers(len(common)))]
    return scene.absent[int(random.integers(len(scene.absent)))]


def training_kinds(scene: Scene, n: int, random: np.random.Generator) -> list[str]:
    """Kinds to ask for in training: about half claimed to be there, of the others half from the company.

    The company is asked for often, as people do: it is what they expect to see.
    """
    denied = [kind for kind in KINDS if kind not in scene.annotated]
    company = [kind for kind in expected_company(scene) if kind in denied] or denied
    pools = (scene.annotated, scene.annotated, company, denied)
    return [pool[int(random.integers(len(pool)))] for pool in (pools[place % 4] for place in range(n))]
