"""The answers of phase 1, one JSON object per line, as later phases read them.

    {"id": 1, "response": "...", "image": "AMBER_1.jpg", "number": 1, "answer_ids": [...],
     "kinds": [["special", 1], ["text", 4], ["image", 576], ...], "n_prompt": 590}

`number` names the file `sample_XXXX.pt`; `kinds` are runs of token kinds over the positions in that file; the
positions from `n_prompt` on belong to the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool

from clt.config.base import write_text_atomically
from clt.errors import DiscoveryError

Region = Literal["counted", "image", "prompt", "answer", "all"]
"""Positions of a sample: of the image; of the prompt's text; of the answer with the last prompt token, from which it
starts; `counted` is the same as `answer` (Score of the phase guide), `all` is everything."""
REGIONS: tuple[Region, ...] = get_args(Region)


@dataclass(frozen=True)
class Response:
    """One answer and the positions it was read at."""

    id: str
    response: str
    image: str
    """Which picture it is about, the same for all questions about it; the sample's id if there is none."""
    number: int
    answer_ids: tuple[int, ...]
    kinds: tuple[tuple[str, int], ...]
    n_prompt: int

    @property
    def n_positions(self) -> int:
        """Positions in the activation file."""
        return sum(length for _, length in self.kinds)

    def mask(self, region: Region) -> Bool[np.ndarray, " position"]:
        """Which positions belong to a region."""
        everywhere = np.arange(self.n_positions)
        if region == "all":
            return np.ones(self.n_positions, dtype=bool)
        if region in ("answer", "counted"):
            return everywhere >= self.n_prompt - 1
        is_image = np.repeat([kind == "image" for kind, _ in self.kinds], [length for _, length in self.kinds])
        in_prompt = everywhere < self.n_prompt - 1
        return in_prompt & is_image if region == "image" else in_prompt & ~is_image

    def to_json(self) -> str:
        """One line; ids that are numbers are written as numbers, as AMBER's evaluator wants them."""
        number = self.id.isdecimal() and str(int(self.id)) == self.id
        return json.dumps({**vars(self), "id": int(self.id) if number else self.id}, ensure_ascii=False)

    @staticmethod
    def from_dict(row: dict[str, Any]) -> Response:
        """A line as it was read."""
        kinds = tuple((str(kind), int(length)) for kind, length in row["kinds"])
        ids = tuple(int(token) for token in row["answer_ids"])
        own = {name: row[name] for name in ("response", "image", "number", "n_prompt")}
        return Response(id=str(row["id"]), answer_ids=ids, kinds=kinds, **own)


def runs_of(names: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Equal neighbours counted: a, a, b -> (a, 2), (b, 1)."""
    return tuple((name, sum(1 for _ in group)) for name, group in groupby(names))


def read_captured(path: Path) -> list[Response]:
    """All answers.

    Raises:
        DiscoveryError: the file is missing, cut off, lacks what capture writes, or holds an id twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DiscoveryError(f"{path} does not exist. `clt phase capture` writes it.") from None
    rows = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise DiscoveryError(
                f"{path} holds the id {row.id!r} twice. Keep one of the lines and its activation file."
            )
        seen.add(row.id)
    return rows


def read_finished(path: Path) -> list[Response]:
    """The answers that a stopped capture had finished: a last line that was cut off does not count."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    return [_parse(path, number, line) for number, line in enumerate(whole.splitlines(), 1)]


def write_captured(path: Path, rows: Sequence[Response]) -> None:
    """Replace the file in one step."""
    write_text_atomically(path, "".join(f"{row.to_json()}\n" for row in rows))


def _parse(path: Path, number: int, line: str) -> Response:
    try:
        return Response.from_dict(json.loads(line))
    except json.JSONDecodeError as error:
        raise DiscoveryError(f"{path}, line {number}, is not JSON ({error.msg}). Was it cut off?") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DiscoveryError(
            f"{path}, line {number}, was not written by `clt phase capture`: {error!r}. The phases need its token "
            "kinds; capture the answers with it, or use `clt bench score` for answers alone."
        ) from None
