"""The shapes world as others use it: samples, questions, descriptions, scores and the host's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clt.types import Sample
from clt.worlds.base import Split, shipped_host
from clt.worlds.shapes import score, text
from clt.worlds.shapes.draw import draw
from clt.worlds.shapes.scene import Scene, scene

QUESTIONS_PER_SCENE = 2 * len(text.CATEGORIES)


class ShapesWorld:
    """Drawn images with themes, told by annotators who claim what they expect to see."""

    name = "shapes"
    summary = "drawn images, yes/no questions and descriptions; a tiny LLaVA that hallucinates"

    def host_path(self) -> Path:
        """Folder of the shipped LLaVA: weights (fp16 at rest), tokenizer, processor, training record."""
        return shipped_host(self.name)

    def samples(self, split: Split, n: int, seed: int = 0) -> list[Sample]:
        """What the host is captured on: one scene each, a description and two questions in turn.

        The answers are the annotator's, claims included: the text the host was trained to give.
        """
        return [self._annotated(scene(split, index, seed), index) for index in range(n)]

    def questions(self, split: Split, n: int, seed: int = 0) -> list[Sample]:
        """POPE-like questions with the true label, six per scene (two per way of choosing the negative)."""
        n_scenes = -(-n // QUESTIONS_PER_SCENE)
        asked = (
            (place, text_question, now)
            for now in (scene(split, index, seed) for index in range(n_scenes))
            for place, text_question in enumerate(text.pope_questions(now))
        )
        return [
            Sample(
                id=f"{_scene_id(now)}/question-{place}",
                prompt=text.prompt(text.asking_for(question.kind)),
                images=(draw(now),),
                meta={"category": question.category, "label": question.label, "object": question.kind},
            )
            for _, (place, question, now) in zip(range(n), asked)
        ]

    def descriptions(self, split: Split, n: int, seed: int = 0) -> list[Sample]:
        """AMBER-like requests with what is there and what one would wrongly expect."""
        return [
            Sample(
                id=f"{_scene_id(now)}/description",
                prompt=text.prompt(text.DESCRIBE),
                images=(draw(now),),
                meta={"truth": list(now.kinds), "hallucination_targets": text.expected_company(now)},
            )
            for now in (scene(split, index, seed) for index in range(n))
        ]

    def score_questions(self, samples: Sequence[Sample], responses: Sequence[str]) -> dict[str, Any]:
        """POPE's accuracy, precision, recall, f1 and yes_ratio in percent, over all and per category."""
        return score.pope_scores(score.count_questions(samples, responses))

    def score_descriptions(self, samples: Sequence[Sample], responses: Sequence[str]) -> dict[str, Any]:
        """AMBER's chair, cover, hal and cog in percent."""
        return score.amber_scores(score.count_descriptions(samples, responses))

    def question_counts(self, samples: Sequence[Sample], responses: Sequence[str]) -> list[score.QuestionCount]:
        """Per question what was true and what was said, for intervals and verdicts."""
        return score.count_questions(samples, responses)

    def description_counts(self, samples: Sequence[Sample], responses: Sequence[str]) -> list[score.DescriptionCount]:
        """Per description the counts that the scores are made of."""
        return score.count_descriptions(samples, responses)

    def _annotated(self, now: Scene, index: int) -> Sample:
        if index % 3 == 0:
            request, answer, what = text.DESCRIBE, text.annotated_caption(now), "description"
        else:
            # The four pools of `training_kinds` in turn: as many objects claimed as denied.
            kind = text.training_kinds(now, 4, np.random.default_rng((*now.key, 2)))[index % 4]
            request, answer, what = text.asking_for(kind), text.annotated_answer(now, kind), "question"
        return Sample(
            id=f"{_scene_id(now)}/sample",
            prompt=text.prompt(request),
            images=(draw(now),),
            answer=answer,
            meta={"what": what, "truth": list(now.kinds), "claimed": list(now.claimed)},
        )


def _scene_id(now: Scene) -> str:
    split, seed, index = now.key
    return f"shapes/{('train', 'held_out')[split]}/{seed}/{index}"
