"""Who writes labels: an OpenAI-compatible endpoint or a local model; and a cache that replays what they said."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import stamina

from clt.discovery.explain import Writer
from clt.errors import DiscoveryError

_BUSY = (408, 409, 429, 500, 502, 503, 504)
_TIMEOUT_SECONDS = 120.0


class EndpointWriter:
    """Any server with `POST {base}/chat/completions`: OpenAI, vLLM, llama.cpp, Ollama and others."""

    def __init__(
        self, base_url: str, model: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        """Nothing is sent yet.

        Args:
            base_url: up to and including the version, such as http://127.0.0.1:8000/v1.
            transport: for tests.
        """
        self.name = model
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._options: dict[str, Any] = {"headers": headers, "timeout": _TIMEOUT_SECONDS, "transport": transport}

    def answer(self, system: str, question: str, max_tokens: int) -> str:
        """One completion at temperature 0; a busy server is asked again, up to 5 times.

        Raises:
            DiscoveryError: the server cannot be reached, refuses, or answers in another format.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = {"model": self.name, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        url = self._url
        try:
            response = self._post(body)
            return str(response.json()["choices"][0]["message"]["content"] or "")
        except httpx.HTTPStatusError as error:
            text = error.response.text[:300]
            raise DiscoveryError(
                f"{url} answered {error.response.status_code}: {text}\nCheck --model and the key in the environment."
            ) from error
        except httpx.HTTPError as error:
            raise DiscoveryError(f"{url} cannot be reached ({error}). Check --base-url and that it runs.") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DiscoveryError(f"{url} does not answer as an OpenAI-compatible endpoint does ({error!r}).") from error

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        for attempt in stamina.retry_context(on=_is_passing, attempts=5, timeout=300):
            # An answer takes seconds; a connection of its own costs nothing beside it and is always closed.
            with attempt, httpx.Client(**self._options) as client:
                return client.post(self._url, json=body).raise_for_status()
        raise AssertionError("the last attempt raises")


def _is_passing(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _BUSY
    return isinstance(error, httpx.TimeoutException | httpx.RemoteProtocolError)


class LocalWriter:
    """A host of this package, answering greedily in its chat template if it has one."""

    def __init__(self, model: str, device: str | None = None) -> None:
        """Open the model.

        Raises:
            HostModelError: it cannot be opened.
        """
        from clt.lm import ModelAdapter

        self.name = model
        self._adapter = ModelAdapter.from_pretrained(model, device=device)

    def answer(self, system: str, question: str, max_tokens: int) -> str:
        """One greedy answer."""
        from clt.types import Sample

        tokenizer: Any = self._adapter.tokenizer
        prompt = f"{system}\n\n{question}\n\nAnswer:"
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": f"{system}\n\n{question}"}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        sample = Sample(id="label", prompt=prompt)
        return self._adapter.generate([sample], max_new_tokens=max_tokens)[0]


class CachedWriter:
    """Asks another writer at most once per question; answers are kept in a file, one JSON object per line.

    With `writer=None` only what is in the file is answered: a replay that needs no model and no network.
    """

    def __init__(self, path: Path, writer: Writer | None, name: str) -> None:
        """Read what is known.

        Raises:
            DiscoveryError: the file holds something else.
        """
        self.name, self._path, self._writer = name, path, writer
        self._lock = threading.Lock()
        self.n_asked = 0
        """Questions that were not in the file."""
        try:
            lines = _whole_lines(path)
            self._known = {entry["key"]: str(entry["answer"]) for entry in map(json.loads, lines)}
        except (ValueError, KeyError, TypeError) as error:
            raise DiscoveryError(
                f"{path} is no file of answers ({error!r}). Move it away to start a new one."
            ) from None

    def answer(self, system: str, question: str, max_tokens: int) -> str:
        """The kept answer, or a new one, which is kept at once.

        Raises:
            DiscoveryError: there is no kept answer and nobody to ask.
        """
        content = json.dumps([self.name, system, question, max_tokens], ensure_ascii=False)
        key = hashlib.sha256(content.encode()).hexdigest()
        with self._lock:
            if key in self._known:
                return self._known[key]
        if self._writer is None:
            raise DiscoveryError(
                f"{self._path} has no answer to one of the questions: the examples, the settings or the model differ. "
                "Run without --replay to ask the model."
            )
        answer = self._writer.answer(system, question, max_tokens)
        entry = {"key": key, "model": self.name, "system": system, "question": question, "answer": answer}
        with self._lock:
            self.n_asked += 1
            self._known[key] = answer
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return answer


def _whole_lines(path: Path) -> list[str]:
    """The file's lines; a last one that was cut off while being written goes."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return whole.splitlines()
