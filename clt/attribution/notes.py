"""What a reader adds to a graph in the browser: pins, supernodes, labels; one small JSON file beside the graph.

{"format": "crosslayer-notes", "format_version": 1, "pinned": [node id], "threshold": 0.8,
 "supernodes": [{"name": str, "nodes": [node id]}], "labels": {"layer/feature": str}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clt.config.base import write_text_atomically
from clt.errors import GraphError

EMPTY: dict[str, Any] = {"pinned": [], "supernodes": [], "labels": {}, "threshold": None}
_FORMAT, _VERSION = "crosslayer-notes", 1
_KEY = re.compile(r"\d{1,6}/\d{1,9}")
_MOST, _LONGEST = 20_000, 2_000


def read_notes(path: Path) -> dict[str, Any] | None:
    """The notes in a file; None if there is none.

    Raises:
        GraphError: the file is no notes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise GraphError(f"{path} is no whole JSON file ({error}). Repair it, or delete it to start anew.") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise GraphError(f"{path} holds no notes of a graph. Delete or rename it to start anew.")
    return checked_notes(content, str(path))


def write_notes(path: Path, notes: Mapping[str, Any]) -> None:
    """Write notes that `checked_notes` has passed."""
    content = {"format": _FORMAT, "format_version": _VERSION, **notes}
    write_text_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def checked_notes(notes: Mapping[str, Any], name: str = "notes") -> dict[str, Any]:
    """The known keys, complete and of the right types.

    Raises:
        GraphError: a value is of another type, or too long to be a person's notes.
    """
    pinned, groups = notes.get("pinned") or [], notes.get("supernodes") or []
    labels, threshold = notes.get("labels") or {}, notes.get("threshold")
    checks = {
        "pinned must be a list of node ids": _are_texts(pinned),
        "supernodes must be a list of {name, nodes}": isinstance(groups, list) and all(map(_is_group, groups)),
        'labels must be {"layer/feature": text}': isinstance(labels, dict) and _are_labels(labels),
        "threshold must be a number or null": threshold is None or isinstance(threshold, int | float),
    }
    for rule, holds in checks.items():
        if not holds:
            raise GraphError(f"{name}: {rule}, at most {_MOST:,} entries of at most {_LONGEST:,} letters.")
    groups = [{"name": group["name"], "nodes": list(group["nodes"])} for group in groups]
    return {"pinned": list(pinned), "supernodes": groups, "labels": dict(labels), "threshold": threshold}


def _are_texts(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > _MOST:
        return False
    return all(isinstance(value, str) and len(value) <= _LONGEST for value in values)


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and _are_texts([group.get("name")]) and _are_texts(group.get("nodes"))


def _are_labels(labels: dict[Any, Any]) -> bool:
    return _are_texts(list(labels)) and _are_texts(list(labels.values())) and all(map(_KEY.fullmatch, labels))
