"""What benchmarks with a judge have in common: the judge's options, and prompts from a template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clt.benchmarks.files import read_text
from clt.benchmarks.judges import Judged, ask, judge_names
from clt.config.base import require_one_of
from clt.errors import BenchmarkError


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Who judges, and where the judgements are kept."""

    judge: str = "none"
    """none, rule, file (replay the log), openai (an endpoint), local (a Hugging Face model), or a registered one."""
    judge_model: str | None = None
    """The judge's model; openai: None = CLT_JUDGE_MODEL of the environment."""
    judge_url: str | None = None
    """openai: base URL; None = CLT_JUDGE_URL of the environment. The key is CLT_JUDGE_KEY."""
    judge_log: str | Path | None = None
    """JSON lines of every request and reply; read by judge = file, and never asked twice by the others."""
    judge_timeout_seconds: float = 60.0
    """For each call of openai."""
    template: str | Path | None = None
    """Text file with the judge's prompt, to use the official wording; None: ours, which asks for the same reply."""

    def __post_init__(self) -> None:
        require_one_of(type(self).__name__, "judge", self.judge, tuple(judge_names()))

    def asked(self, prompts: Sequence[str]) -> Judged:
        """The judge's replies.

        Raises:
            BenchmarkError: there is no judge, or what `ask` raises.
        """
        if self.judge in ("none", "rule"):
            has_rule = "" if self.judge == "none" else "No rule can rate these answers. "
            raise BenchmarkError(
                f"judge = {self.judge!r}: {has_rule}This benchmark needs a judge: --judge openai with --judge-url and "
                "--judge-model, --judge local with --judge-model, or --judge file with --judge-log to replay."
            )
        log = Path(self.judge_log) if self.judge_log else None
        more = {} if self.judge == "file" else {"url": self.judge_url, "timeout_seconds": self.judge_timeout_seconds}
        return ask(self.judge, prompts, log, self.judge_model, **more)

    def wording(self, ours: str, fields: Sequence[str]) -> str:
        """The prompt's template.

        Raises:
            BenchmarkError: the file lacks one of the fields, as in `{question}`.
        """
        if self.template is None:
            return ours
        text = read_text(Path(self.template), "judge template")
        missing = [name for name in fields if f"{{{name}}}" not in text]
        if missing:
            raise BenchmarkError(f"{self.template} lacks {{{missing[0]}}}. A template needs {', '.join(fields)}.")
        return text


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its `{fields}` replaced in one go; other braces, also inside the values, stay."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)
