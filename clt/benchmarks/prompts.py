"""From a bare question to a host's prompt."""

from __future__ import annotations

from dataclasses import replace

from clt.errors import BenchmarkError
from clt.types import Sample

LLAVA_TEMPLATE = "USER: <image>\n{question} ASSISTANT:"
"""LLaVA-1.5 as its Hugging Face chat template writes it; the BOS is the tokenizer's."""
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA's own evaluation appends to yes/no questions."""


def framed(sample: Sample, template: str = LLAVA_TEMPLATE, suffix: str = "", placeholder: str = "<image>") -> Sample:
    """The sample with its question inside the template; a prompt that holds the placeholder already stays as it is.

    Args:
        sample: with a bare question as prompt.
        template: text with `{question}` in it and one placeholder per image.
        suffix: appended to the question.
        placeholder: how the host's prompts mark an image.

    Raises:
        BenchmarkError: the template has no `{question}`.
    """
    if placeholder in sample.prompt:
        return sample
    if "{question}" not in template:
        raise BenchmarkError(f"The template {template!r} has no {{question}} to put the question in.")
    text = template.replace("{question}", sample.prompt + suffix)
    if not sample.images:
        text = text.replace(f"{placeholder}\n", "").replace(placeholder, "")
    return replace(sample, prompt=text)
