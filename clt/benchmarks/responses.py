"""Response files: rows with ids are joined by id, rows without ids by position, and nothing is dropped in silence.

Read: JSON lists and JSON lines; an id under `id`, `question_id` or `sample_id`; the response under `response`,
`answer`, `text`, ... (`RESPONSE_KEYS`). This covers the files of AMBER, POPE, LLaVA's fork of POPE, MMHal-Bench and
LLaVA-Bench, and the `model_responses.jsonl` that the phases write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clt.benchmarks.base import Benchmark, ReadsResponses, few
from clt.benchmarks.files import read_rows, text_of, unique
from clt.errors import BenchmarkError
from clt.types import Sample

ID_KEYS = ("id", "question_id", "sample_id")
RESPONSE_KEYS = ("response", "answer", "model_answer", "model_prediction", "caption", "text", "output", "prediction")
QUESTION_KEYS = ("question", "prompt", "query")


def read_responses(path: str | Path, benchmark: Benchmark, keys: Sequence[str] = RESPONSE_KEYS) -> dict[str, str]:
    """Response by sample id.

    Args:
        path: a JSON list or JSON lines.
        benchmark: asked for its samples only when the rows have no ids; row n then answers sample n.
        keys: where a row may keep its response, the first that it has.

    Raises:
        BenchmarkError: the file is damaged, an id occurs twice, only some rows have ids, or rows without ids are more
            than the samples or answer other questions.
    """
    path = Path(path)
    own = benchmark.own_responses(path) if isinstance(benchmark, ReadsResponses) else None
    if own is not None:
        return own
    rows = read_rows(path, "responses")
    ids = [_id_of(row) for row in rows]
    if all(id is None for id in ids):
        return _by_position(path, rows, list(benchmark.samples()), keys)
    if None in ids:
        raise BenchmarkError(
            f"{path}: row {ids.index(None) + 1} has no id ({' or '.join(ID_KEYS)}), other rows have one. "
            "Give all rows an id, or none to join them by position."
        )
    texts = (text_of(row, keys, f"{path}, row {number}") for number, row in enumerate(rows, 1))
    return dict(zip(unique([str(id) for id in ids], str(path)), texts))


def write_responses(path: str | Path, responses: Mapping[str, str]) -> None:
    """Write `{"id": ..., "response": ...}` lines that `read_responses` reads back.

    Raises:
        OSError: the file cannot be written.
    """
    lines = (json.dumps({"id": id, "response": text}, ensure_ascii=False) for id, text in responses.items())
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _id_of(row: Mapping[str, Any]) -> str | None:
    return next((str(row[key]) for key in ID_KEYS if row.get(key) is not None), None)


def _by_position(
    path: Path, rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample], keys: Sequence[str]
) -> dict[str, str]:
    """Row n answers sample n, as POPE's evaluator has it; fewer rows than samples leave the last ones missing."""
    if len(rows) > len(samples):
        raise BenchmarkError(
            f"{path} has {len(rows):,} rows without ids for {len(samples):,} samples. They belong to another set of "
            "questions, or the file holds more than one run."
        )
    _check_questions(path, rows, samples)
    return {
        sample.id: text_of(row, keys, f"{path}, row {number}")
        for number, (row, sample) in enumerate(zip(rows, samples), 1)
    }


def _check_questions(path: Path, rows: Iterable[Mapping[str, Any]], samples: Sequence[Sample]) -> None:
    """Refuse rows whose own question is the question of another sample: they are in another order."""
    questions = {_plain(sample.prompt) for sample in samples}
    asked = (next((_plain(row[key]) for key in QUESTION_KEYS if isinstance(row.get(key), str)), None) for row in rows)
    moved = [
        number
        for number, (question, sample) in enumerate(zip(asked, samples), 1)
        if question in questions and question != _plain(sample.prompt)
    ]
    if moved:
        raise BenchmarkError(
            f"{path}: {len(moved):,} rows answer another question than the sample at their place (rows "
            f"{few([str(row) for row in moved])}). The rows have no ids, so they must be in the order of the questions."
        )


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()
