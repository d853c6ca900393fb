"""Labels for features, written by a language model from their examples, and scored by how well they predict.

Three questions per feature, each to any `Writer` (an OpenAI-compatible endpoint, or a local model):

    label       examples with the tokens where it fires marked <<like this>> -> a short label
    detection   numbered texts, half of them from other features -> in which does a feature of that label fire?
    fuzzing     numbered texts with tokens marked, half of them in wrong places -> which are marked rightly?

Scores are balanced accuracies on examples that the label was not written from: 0.5 is chance. Sources: Bills et al.
2023, "Language models can explain neurons in language models" (labels from marked examples); Paulo et al. 2024,
"Automatically Interpreting Millions of Features in LLMs" (detection and fuzzing).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from clt.discovery.labels import FeatureLabel
from clt.errors import DiscoveryError
from clt.types import FeatureId

_SHARE = 0.3
"""Tokens with at least this share of an example's highest activation are marked."""
_TOKENS_AROUND = 24


@runtime_checkable
class Writer(Protocol):
    """Something that answers a prompt."""

    name: str

    def answer(self, system: str, question: str, max_tokens: int) -> str:
        """The answer's text."""
        ...


@dataclass(frozen=True)
class Text:
    """One example: its tokens, and how strongly the feature fires at each."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    def plain(self) -> str:
        """As running text."""
        return "".join(map(_readable, self.tokens)).strip()

    def marked(self, where: Sequence[bool]) -> str:
        """With runs of the given tokens between << and >>."""
        parts, is_inside = [], False
        for token, mark in zip(self.tokens, where, strict=True):
            text = _readable(token)
            if mark and not is_inside:
                space = text[: len(text) - len(text.lstrip())]
                parts += [space, "<<", text.lstrip()]
            else:
                parts += [">>", text] if is_inside and not mark else [text]
            is_inside = mark
        return ("".join(parts) + (">>" if is_inside else "")).strip()

    @property
    def fires(self) -> list[bool]:
        """Where the activation is a good part of the text's highest."""
        top = max(self.activations, default=0.0)
        return [value > 0 and value >= _SHARE * top for value in self.activations]


@dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """How many examples each question gets."""

    n_shown: int = 12
    """Examples the label is written from."""
    n_tested: int = 8
    """Other examples of the feature for detection and fuzzing each, with as many that are not."""
    seed: int = 0


_LABEL = (
    "You are labelling a feature inside a language model. You see texts in which it fires; the tokens where it fires "
    "most are between << and >>. Say in at most ten words what those tokens, or what leads up to them, have in common. "
    "Be as specific as all texts allow. Answer with the label alone."
)
_DETECTION = (
    "A feature inside a language model has the label given below. For each numbered text decide whether the feature "
    "fires somewhere in it. Answer with the numbers of the texts where it fires, separated by commas, or with 'none'."
)
_FUZZING = (
    "A feature inside a language model has the label given below. In each numbered text some tokens are between << and "
    ">>. Answer with the numbers of the texts whose marked tokens fit the label, separated by commas, or with 'none'."
)


def explain_feature(
    feature: FeatureId,
    examples: Mapping[str, Any],
    others: Sequence[Text],
    writer: Writer,
    settings: ExplainSettings,
) -> FeatureLabel | None:
    """A label and its scores; None if the feature has too few examples.

    Args:
        examples: the feature's examples in the public format.
        others: texts in which other features fire, for detection.
    """
    texts = texts_of(examples)
    if len(texts) < 2:
        return None
    rng = random.Random(f"{settings.seed} {feature.layer} {feature.feature}")
    n_tested = min(settings.n_tested, len(texts) // 2)
    tested = sorted(rng.sample(range(len(texts)), n_tested))
    shown = [text for place, text in enumerate(texts) if place not in tested][: settings.n_shown]
    label = write_label(shown, writer)
    kept = [texts[place] for place in tested]
    strangers = rng.sample(others, min(len(others), n_tested))
    return FeatureLabel(
        text=label,
        source=writer.name,
        detection=detection(label, kept, strangers, writer, rng),
        fuzzing=fuzzing(label, kept, writer, rng),
    )


def write_label(texts: Sequence[Text], writer: Writer) -> str:
    """What a feature stands for, in a few words.

    Raises:
        DiscoveryError: the writer answered with nothing.
    """
    question = "\n".join(f"{number}. {text.marked(text.fires)}" for number, text in enumerate(texts, start=1))
    answer = writer.answer(_LABEL, question, 40).strip()
    label = answer.splitlines()[0].strip().strip("\"'.").removeprefix("Label:").strip() if answer else ""
    if not label:
        raise DiscoveryError(f"{writer.name} answered with an empty label. Try another model, or ask again later.")
    return label[:200]


def detection(
    label: str, own: Sequence[Text], others: Sequence[Text], writer: Writer, rng: random.Random
) -> float | None:
    """Balanced accuracy of telling by the label which texts the feature fires in; None without texts of both kinds."""
    cases = [(text.plain(), True) for text in own] + [(text.plain(), False) for text in others]
    return _scored(_DETECTION, label, cases, writer, rng)


def fuzzing(label: str, own: Sequence[Text], writer: Writer, rng: random.Random) -> float | None:
    """Balanced accuracy of telling by the label which marks are right; wrong ones are as many, on silent tokens."""
    cases = []
    for place, text in enumerate(own):
        silent = [at for at, value in enumerate(text.activations) if value <= 0]
        n_marks = min(sum(text.fires), len(silent))
        if place % 2 and n_marks:
            wrong = set(rng.sample(silent, n_marks))
            cases.append((text.marked([at in wrong for at in range(len(text.tokens))]), False))
        else:
            cases.append((text.marked(text.fires), True))
    return _scored(_FUZZING, label, cases, writer, rng)


def _scored(
    system: str, label: str, cases: Sequence[tuple[str, bool]], writer: Writer, rng: random.Random
) -> float | None:
    truth = [is_right for _, is_right in cases]
    if all(truth) or not any(truth):
        return None
    order = rng.sample(range(len(cases)), len(cases))
    listed = "\n".join(f"{number}. {cases[case][0]}" for number, case in enumerate(order, start=1))
    chosen = chosen_numbers(writer.answer(system, f"Label: {label}\n\n{listed}", 120), len(cases))
    if chosen is None:
        return None
    said = {order[number - 1] for number in chosen}
    hits = sum(case in said for case, is_right in enumerate(truth) if is_right) / sum(truth)
    passes = sum(case not in said for case, is_right in enumerate(truth) if not is_right) / truth.count(False)
    return (hits + passes) / 2


def chosen_numbers(answer: str, most: int) -> set[int] | None:
    """The numbers an answer lists; None if it lists none and does not say so."""
    numbers = {int(number) for number in re.findall(r"\d+", answer)}
    if not numbers and not re.search(r"\bnone\b", answer, re.IGNORECASE):
        return None
    return {number for number in numbers if 1 <= number <= most}


def texts_of(examples: Mapping[str, Any]) -> list[Text]:
    """A feature's examples, cut to what is around the strongest token, each once, strongest first."""
    found: dict[str, tuple[float, Text]] = {}
    for group in examples.get("examples_quantiles", []):
        for example in group["examples"]:
            tokens, values = example["tokens"], example["tokens_acts_list"]
            if not any(value > 0 for value in values):
                continue
            centre = max(range(len(values)), key=values.__getitem__)
            part = slice(max(0, centre - _TOKENS_AROUND), centre + _TOKENS_AROUND // 2)
            text = Text(tuple(tokens[part]), tuple(map(float, values[part])))
            found.setdefault(text.plain(), (max(text.activations), text))
    return [text for _, text in sorted(found.values(), key=lambda each: -each[0])]


def _readable(token: str) -> str:
    return token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").replace("\n", " ")
