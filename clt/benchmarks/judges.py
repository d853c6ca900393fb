"""Judges: who rates answers that no rule can rate. Every request and reply is kept in a file that can be replayed.

A judge is anything with a `model` name that turns prompts into replies; a call that failed returns its error in the
reply's place. Built in: `openai` (any endpoint that speaks OpenAI's chat completions) and `local` (any Hugging Face
model; an entry point, because this package may not import models). `file` asks nobody and replays a log. Others come
through `register_judge` or the entry point group `crosslayer.judges`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import httpx

from clt.benchmarks.files import fingerprint, read_rows
from clt.errors import BenchmarkError

JUDGE_GROUP = "crosslayer.judges"
URL_VARIABLE, MODEL_VARIABLE, KEY_VARIABLE = "CLT_JUDGE_URL", "CLT_JUDGE_MODEL", "CLT_JUDGE_KEY"


@runtime_checkable
class Judge(Protocol):
    """A plug-in that answers prompts."""

    @property
    def model(self) -> str:
        """Who answers; part of each reply's key in the log."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Sequence[str | BenchmarkError]:
        """A reply, or why there is none, for each prompt."""
        ...


class OpenAIJudge:
    """An endpoint that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, Ollama, ...

    Args:
        model: name of the model; None: from CLT_JUDGE_MODEL.
        url: base URL such as `http://127.0.0.1:8000/v1`; None: from CLT_JUDGE_URL. The key is read from CLT_JUDGE_KEY.
        timeout_seconds: for each call.
        attempts: how often a call is tried that times out or that the server puts off (429, 5xx).
        transport: for tests: answers without a network.

    Raises:
        BenchmarkError: no model or no URL.
    """

    def __init__(
        self,
        model: str | None = None,
        url: str | None = None,
        timeout_seconds: float = 60.0,
        attempts: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.model = model or os.environ.get(MODEL_VARIABLE, "")
        url = url or os.environ.get(URL_VARIABLE, "")
        if not self.model or not url:
            raise BenchmarkError(
                f"judge = 'openai' needs a model and a URL: --judge-model and --judge-url, or {MODEL_VARIABLE} and "
                f"{URL_VARIABLE} in the environment."
            )
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._attempts = attempts
        self._client = httpx.Client(
            base_url=url.rstrip("/"), timeout=timeout_seconds, headers=headers, transport=transport
        )

    def __call__(self, prompts: Sequence[str]) -> list[str | BenchmarkError]:
        """One call per prompt, temperature 0."""
        return [self._ask(prompt) for prompt in prompts]

    def _ask(self, prompt: str) -> str | BenchmarkError:
        request = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        failure = BenchmarkError("no attempt was made")
        for _ in range(self._attempts):
            try:
                answer = self._client.post("/chat/completions", json=request)
            except httpx.HTTPError as error:
                failure = BenchmarkError(f"{type(error).__name__}: {error}")
                continue
            if answer.status_code == 200:
                return _content(answer)
            failure = BenchmarkError(f"HTTP {answer.status_code}: {answer.text[:200]}")
            if answer.status_code != 429 and answer.status_code < 500:
                break
        return failure


def _content(answer: httpx.Response) -> str | BenchmarkError:
    try:
        content = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return BenchmarkError(f"the reply is no chat completion: {answer.text[:200]}")
    return content if isinstance(content, str) else BenchmarkError(f"the reply holds no text: {content!r}")


PATIENCE = 5
"""When so many calls fail and none has succeeded yet, the others are not made: each may wait for its timeout."""

JudgeFactory = Callable[..., Judge]
_FACTORIES: dict[str, JudgeFactory] = {"openai": OpenAIJudge}


def register_judge(name: str, factory: JudgeFactory) -> None:
    """Make `judge = name` call `factory(model=..., url=..., timeout_seconds=...)`; lasts as long as the program."""
    _FACTORIES[name] = factory


def judge_names() -> list[str]:
    """All judges; `none` refuses, `rule` is the benchmark's own rule, `file` replays."""
    return ["none", "rule", "file", *sorted({*_FACTORIES, *(point.name for point in entry_points(group=JUDGE_GROUP))})]


def judge_of(name: str, **options: Any) -> Judge:
    """The judge of that name.

    Raises:
        BenchmarkError: there is none.
    """
    if name in _FACTORIES:
        return _FACTORIES[name](**options)
    for point in entry_points(group=JUDGE_GROUP, name=name):
        return point.load()(**options)
    raise BenchmarkError(f"There is no judge {name!r}. There are: {', '.join(judge_names())}.")


class Judged(NamedTuple):
    """What came of asking a judge."""

    replies: list[str | None]
    """None where the call failed."""
    provenance: dict[str, Any]

    def require_read(self, n_read: int) -> None:
        """See that some reply said what was asked for: a score of replies that nobody can read is no score.

        Raises:
            BenchmarkError: none of them could be read.
        """
        given = [reply for reply in self.replies if reply is not None]
        if given and not n_read:
            raise BenchmarkError(
                f"None of {len(given):,} replies of the judge {self.provenance['judge_model']!r} could be read. The "
                f"first: {given[0][:200]!r}. Is the model able to follow the prompt, and does --option template=FILE "
                "ask for the same form of reply?"
            )


def ask(name: str, prompts: Sequence[str], log: Path | None, model: str | None, **options: Any) -> Judged:
    """Ask the judge, keeping every reply; a prompt that the log answers already is not asked again.

    Args:
        name: of the judge, or `file` to use the log alone.
        prompts: one per response.
        log: JSON lines of key, model, prompt, reply and error; appended to.
        model: of the judge; for `file` only needed when the log holds replies of several.
        options: of the judge.

    Raises:
        BenchmarkError: no log, a log that lacks replies (`file`), no such judge, or every single call (or each of the
            first `PATIENCE`) failed.
    """
    if log is None:
        raise BenchmarkError(
            f"judge = {name!r} needs --judge-log: every judgement is kept, so that it can be replayed."
        )
    known = _read_log(log) if log.is_file() else {}
    if name == "file":
        return _replayed(log, known, prompts, model)
    judge = judge_of(name, model=model, **options)
    asked = [prompt for prompt in dict.fromkeys(prompts) if known.get(_key(judge.model, prompt)) is None]
    errors: list[str] = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        for n_asked, prompt in enumerate(asked):
            if n_asked == len(errors) == PATIENCE:
                raise BenchmarkError(
                    f"The first {PATIENCE} calls of the judge {judge.model!r} failed, so the other "
                    f"{len(asked) - PATIENCE:,} were not made. The last: {errors[-1]}."
                )
            (reply,) = judge([prompt])
            failed = str(reply) if isinstance(reply, BenchmarkError) else None
            errors += [failed] if failed is not None else []
            row = {
                "key": _key(judge.model, prompt),
                "model": judge.model,
                "prompt": prompt,
                "reply": None if failed is not None else reply,
                "error": failed,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            known[row["key"]] = row["reply"]
    replies = [known[_key(judge.model, prompt)] for prompt in prompts]
    if prompts and all(reply is None for reply in replies):
        raise BenchmarkError(f"All {len(prompts):,} calls of the judge {judge.model!r} failed. The last: {errors[-1]}.")
    counted = {"n_judge_calls": len(asked), "n_judge_failures": sum(reply is None for reply in replies)}
    return Judged(replies, {"judge": name, "judge_model": judge.model, "judge_log": log.name, **counted})


def _replayed(log: Path, known: Mapping[str, str | None], prompts: Sequence[str], model: str | None) -> Judged:
    if not log.is_file():
        raise BenchmarkError(f"judge = 'file' replays {log}, which does not exist.")
    models = {row.get("model") for row in read_rows(log, "judge log")} if model is None else {model}
    if len(models) != 1:
        raise BenchmarkError(f"{log} holds replies of {len(models)} judges ({_listed(models)}). Choose --judge-model.")
    (model,) = (str(each) for each in models)
    keys = [_key(model, prompt) for prompt in prompts]
    missing = sum(key not in known for key in keys)
    if missing:
        raise BenchmarkError(
            f"{log} has no reply of {model!r} to {missing:,} of {len(prompts):,} requests. The responses or "
            "the wording of the prompt have changed since it was written; ask a judge again with the same --judge-log."
        )
    replies = [known[key] for key in keys]
    counted = {"n_judge_calls": 0, "n_judge_failures": sum(reply is None for reply in replies)}
    return Judged(replies, {"judge": "file", "judge_model": model, "judge_log": fingerprint(log), **counted})


def _read_log(log: Path) -> dict[str, str | None]:
    """Reply by key; a later reply to the same request replaces an earlier failure."""
    known: dict[str, str | None] = {}
    for number, row in enumerate(read_rows(log, "judge log") if log.stat().st_size else [], 1):
        if not isinstance(row.get("model"), str) or not isinstance(row.get("prompt"), str) or "reply" not in row:
            raise BenchmarkError(f"{log}, row {number}: a judge log has model, prompt and reply in every row.")
        known[_key(row["model"], row["prompt"])] = row["reply"]
    return known


def _key(model: str, prompt: str) -> str:
    return hashlib.sha256(f"{model}\0{prompt}".encode()).hexdigest()


def _listed(models: set[Any]) -> str:
    return ", ".join(sorted(map(str, models)))
