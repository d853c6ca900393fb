"""A host model as judge of other models' answers; the judge `local` of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from clt.errors import HostModelError
from clt.lm.adapter import ModelAdapter
from clt.types import Sample


class LocalJudge:
    """Any Hugging Face language model, asked greedily through its chat template if it has one.

    Args:
        model: folder or name on the Hub.
        url: for judges behind an address; a local one has none.
        timeout_seconds: likewise.
        max_new_tokens: how long a judgement may become.

    Raises:
        HostModelError: no model was named, or it cannot be loaded.
    """

    def __init__(
        self,
        model: str | None = None,
        url: str | None = None,
        timeout_seconds: float | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        if model is None:
            raise HostModelError("judge = 'local' needs --judge-model: a folder or a name on the Hub.")
        if url is not None:
            raise HostModelError(f"judge = 'local' has no use for --judge-url {url}. Did you mean judge = 'openai'?")
        self.model = model
        self._max_new_tokens = max_new_tokens
        self._adapter = ModelAdapter.from_pretrained(model)

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """A reply to each prompt."""
        samples = [Sample(id=str(place), prompt=self._framed(prompt)) for place, prompt in enumerate(prompts)]
        return self._adapter.generate(samples, max_new_tokens=self._max_new_tokens)

    def _framed(self, prompt: str) -> str:
        tokenizer = self._adapter.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            return prompt
        turns = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
