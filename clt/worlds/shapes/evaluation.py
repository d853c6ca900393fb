"""Scoring a host folder on held-out scenes, through the road a user takes: `from_pretrained` and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from clt.types import Sample
from clt.worlds.shapes.world import ShapesWorld

LONGEST_ANSWER = 40
"""New tokens; the longest annotated caption has about 25."""


@torch.no_grad()
def respond(folder: Path, samples: Sequence[Sample], batch: int = 64) -> list[str]:
    """The host's greedy responses."""
    processor = AutoProcessor.from_pretrained(folder)
    # transformers annotates `generate` with a protocol that its own models do not meet.
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    responses: list[str] = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        pictures = [[sample.images[0]] for sample in part]
        inputs = processor(text=[sample.prompt for sample in part], images=pictures, padding=True, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        answers = generated[:, inputs["input_ids"].shape[1] :]
        responses += [answer.strip() for answer in processor.batch_decode(answers, skip_special_tokens=True)]
    return responses


def evaluate(folder: Path, n: int, seed: int = 0) -> dict[str, Any]:
    """POPE-like and AMBER-like scores on `n` held-out questions and `n` held-out descriptions."""
    world = ShapesWorld()
    questions, descriptions = world.questions("held_out", n, seed), world.descriptions("held_out", n, seed)
    return {
        "pope": world.score_questions(questions, respond(folder, questions)),
        "amber_like": world.score_descriptions(descriptions, respond(folder, descriptions)),
        "seed": seed,
    }
