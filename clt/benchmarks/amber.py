"""AMBER: describe an image (objects found and objects invented), or answer yes/no about what is not there.

`load("amber", data=..., task="generative")` gives the generative set, any other task the yes/no questions or a part of
them. The numbers are those of the released evaluator: counts pooled over all responses, 0.001 added to every
denominator, percentages rounded to one decimal. The paper's AMBER score is (100 - chair + f1) / 2.

Source: Wang et al. 2023, "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation",
arXiv 2311.07397; github.com/junyangwang0410/AMBER.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from clt.benchmarks.amber_data import GENERATIVE
from clt.benchmarks.amber_generative import AmberGenerative
from clt.benchmarks.amber_questions import TASKS, AmberQuestions
from clt.errors import BenchmarkError


def amber(
    *,
    data: str | Path,
    task: str = GENERATIVE,
    images: str | Path | None = None,
    extractor: str = "auto",
    similarity: str = "identity",
    **options: Any,
) -> AmberGenerative | AmberQuestions:
    """Descriptions (objects invented, objects found) or yes/no questions about what is and is not in the image.

    Args:
        data: AMBER's `data` folder (or the official repository).
        task: generative; discriminative, or its parts existence, attribute, relation.
        images: folder of the images; needed to ask, not to score.
        extractor: how nouns are found (auto, nltk, rules); the yes/no tasks have no use for it.
        similarity: which words count as the same (identity, file, spacy); the yes/no tasks have no use for it.
        options: similarity_file, rule (attainable, coverage), good_cover, bad_cover, digits for descriptions;
            parser (official, first_word), digits for questions.

    Raises:
        BenchmarkError: no such task, or an option that the task does not have.
    """
    if task not in (GENERATIVE, *TASKS):
        raise BenchmarkError(f"AMBER has no task {task!r}. It has: {', '.join((GENERATIVE, *TASKS))}.")
    kind = AmberGenerative if task == GENERATIVE else AmberQuestions
    known = {each.name for each in fields(kind)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise BenchmarkError(f"AMBER's task {task!r} has no option {unknown[0]!r}. It has: {', '.join(sorted(known))}.")
    if task == GENERATIVE:
        return AmberGenerative(data=data, images=images, extractor=extractor, similarity=similarity, **options)
    return AmberQuestions(data=data, images=images, task=task, **options)
