"""Reading the files of benchmarks: JSON lists, JSON lines, images; and which files a number was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clt.benchmarks.base import few
from clt.errors import BenchmarkError


def read_json(path: Path, what: str) -> Any:
    """The file's JSON value.

    Raises:
        BenchmarkError: the file is missing or no JSON; the message calls it `what`.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchmarkError(
            f"{path} ({what}) is not JSON: line {error.lineno}, {error.msg}. Was it cut off while being written?"
        ) from None


def read_rows(path: Path, what: str) -> list[dict[str, Any]]:
    """A table of objects: a JSON list, or one JSON object per line.

    Raises:
        BenchmarkError: the file is missing, empty, no JSON, or holds something else than objects.
    """
    text = read_text(path, what)
    if not text.strip():
        raise BenchmarkError(f"{path} ({what}) is empty.")
    rows = json.loads(text) if _is_one_value(text) else [_line(path, what, *each) for each in _lines(text)]
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise BenchmarkError(f"{path} ({what}) must be a list of JSON objects, or one object per line.")
    return rows


def read_text(path: Path, what: str) -> str:
    """The file's text.

    Raises:
        BenchmarkError: the file is missing or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BenchmarkError(f"{path} ({what}) does not exist.") from None
    except IsADirectoryError:
        raise BenchmarkError(f"{path} is a folder; {what} must be a file.") from None
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} ({what}) is not UTF-8 text ({error}).") from None


def text_of(row: Mapping[str, Any], keys: Iterable[str], where: str) -> str:
    """The first of the keys that the row has, as text.

    Raises:
        BenchmarkError: it has none of them, or the value is neither text nor a number.
    """
    keys = tuple(keys)
    for key in keys:
        value = row.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            raise BenchmarkError(f"{where}: {key} is {value!r}; it must be text.")
    raise BenchmarkError(f"{where} has none of the keys {', '.join(keys)}. It has: {', '.join(row) or 'nothing'}.")


def image_files(folder: Path | None, names: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """Each image's path, as a sample takes it; nothing where no folder was given.

    Raises:
        BenchmarkError: the folder or some of the images are missing.
    """
    names = list(dict.fromkeys(names))
    if folder is None:
        return dict.fromkeys(names, ())
    if not folder.is_dir():
        raise BenchmarkError(f"The image folder {folder} does not exist.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BenchmarkError(
            f"{len(missing):,} of {len(names):,} images are not in {folder}: {few(missing)}. Download them, or give "
            "the folder that holds them with --images."
        )
    return {name: (folder / name,) for name in names}


def unique(ids: Iterable[str], where: str) -> list[str]:
    """The ids as a list.

    Raises:
        BenchmarkError: an id occurs twice.
    """
    ids = list(ids)
    seen: set[str] = set()
    twice = [id for id in ids if id in seen or seen.add(id)]
    if twice:
        raise BenchmarkError(
            f"{where}: {len(twice):,} ids occur more than once: {few(twice)}. Keep one row of each; counted twice they "
            "would weigh double."
        )
    return ids


def fingerprint(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a file, for the provenance of a number."""
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _is_one_value(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return text.lstrip().startswith("[")


def _lines(text: str) -> Iterable[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _line(path: Path, what: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise BenchmarkError(
            f"{path} ({what}), line {number}, is not JSON: {error.msg}. Was the file cut off while being written?"
        ) from None
