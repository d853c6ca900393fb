"""A folder of graphs: what is in it, opened views, readers' notes. Clients name graphs, never paths."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clt.attribution.notes import EMPTY, checked_notes, read_notes, write_notes
from clt.attribution.view import GraphView
from clt.attribution.view_files import GRAPH_JSON, open_view
from clt.discovery.feature_files import FeatureFiles
from clt.discovery.labels import BY_HAND_FILE, LABELS_FILE, READER, FeatureLabel, read_labels, write_labels
from clt.discovery.pictures import with_pictures
from clt.errors import GraphError

_NOTES = ".notes.json"
_NO_GRAPHS = ("graph-metadata.json", LABELS_FILE, BY_HAND_FILE)
_KEPT = 3
"""Graphs kept open; one with 9 million edges takes about 0.3 GB."""
_HEAD_BYTES = 2**18


@dataclass(frozen=True)
class Entry:
    """One graph of the folder, not opened."""

    slug: str
    path: Path
    prompt: str
    model: str
    n_nodes: int | None = None
    n_edges: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the page's list of graphs shows."""
        return {name: value for name, value in asdict(self).items() if name != "path"}


class GraphLibrary:
    """The graphs under one folder, or the one graph that the folder or file is."""

    def __init__(self, root: Path, features: Path | None = None, images: Path | None = None) -> None:
        """Check that both exist.

        Args:
            root: folder of graphs (graph folders and graph JSON files), one graph folder, or one graph JSON file.
            features: folder of the transcoder's feature examples; labels are kept there too.
            images: folder of the images that examples name; besides it, only the folder of examples is looked in.

        Raises:
            GraphError: there is no such folder.
            DatasetError: the folder of examples holds none.
        """
        if not root.exists():
            raise GraphError(f"{root} does not exist. Give a folder of graphs; `clt attribute` makes one.")
        self.root = root.resolve()
        self.files = None if features is None else FeatureFiles(features)
        self._label_folder = None if self.files is None else self.files.folder
        self._picture_folders = [folder for folder in (images, self._label_folder) if folder is not None]
        self._views: OrderedDict[Path, tuple[float, GraphView]] = OrderedDict()
        self._lock = threading.RLock()

    def entries(self) -> tuple[list[Entry], list[dict[str, str]]]:
        """(graphs by name, files that look like graphs but cannot be read and why), as the folder is now."""
        if self.root.is_file() or (self.root / GRAPH_JSON).exists():
            paths = [self.root]
        else:
            paths = sorted(path for path in self.root.iterdir() if self._may_be_graph(path))
        entries: dict[str, Entry] = {}
        refused = []
        for path in paths:
            try:
                slug = path.name if path.is_dir() or path.stem in entries else path.stem
                entries[slug] = _entry(path, slug)
            except GraphError as error:
                refused.append({"file": path.name, "reason": str(error)})
        return list(entries.values()), refused

    def _may_be_graph(self, path: Path) -> bool:
        inside = path.resolve().is_relative_to(self.root)
        if not inside or path.name.startswith(".") or path.name in _NO_GRAPHS or path.name.endswith(_NOTES):
            return False
        return (path / GRAPH_JSON).exists() if path.is_dir() else path.suffix == ".json"

    def entry(self, slug: str) -> Entry:
        """The graph of this name.

        Raises:
            GraphError: there is none.
        """
        for entry in self.entries()[0]:
            if entry.slug == slug:
                return entry
        raise GraphError(f"There is no graph {slug!r} in {self.root}. It may have been renamed; reload the page.")

    def view(self, slug: str) -> GraphView:
        """The opened graph; read again if its file has changed."""
        path = self.entry(slug).path
        changed = (path / GRAPH_JSON if path.is_dir() else path).stat().st_mtime
        with self._lock:
            known = self._views.get(path)
            if known is None or known[0] != changed:
                known = self._views[path] = (changed, open_view(path, slug))
            self._views.move_to_end(path)
            while len(self._views) > _KEPT:
                self._views.popitem(last=False)
            return known[1]

    # --- what readers add -----------------------------------------------------------------------------------------

    def notes_path(self, slug: str) -> Path:
        """Where the notes of a graph are kept."""
        path = self.entry(slug).path
        return path / "notes.json" if path.is_dir() else path.with_name(path.stem + _NOTES)

    def notes(self, slug: str) -> dict[str, Any]:
        """The notes of a graph: the saved ones, or those its file came with."""
        saved = read_notes(self.notes_path(slug))
        notes = saved if saved is not None else checked_notes({**EMPTY, **self.view(slug).notes})
        return {**notes, "labels": {**notes["labels"], **self._labels_by_hand()}}

    def save_notes(self, slug: str, notes: Mapping[str, Any]) -> None:
        """Keep a reader's notes; labels go to the transcoder's folder if it is known: all its graphs have them."""
        checked = checked_notes(notes)
        with self._lock:
            path = self._label_folder and self._label_folder / BY_HAND_FILE
            if path and checked["labels"] != self._labels_by_hand():
                write_labels(
                    path, {key: FeatureLabel(text=text, source=READER) for key, text in checked["labels"].items()}
                )
            write_notes(self.notes_path(slug), {**checked, "labels": {} if path else checked["labels"]})

    def _labels_by_hand(self) -> dict[str, str]:
        if self._label_folder is None:
            return {}
        return {key: label.text for key, label in read_labels(self._label_folder / BY_HAND_FILE).items()}

    def explained(self, slug: str) -> dict[str, FeatureLabel]:
        """Labels that no reader wrote: of `clt explain`, and those the graph came with."""
        given = {
            key: FeatureLabel(text=text, source="the graph's file") for key, text in self.view(slug).labels.items()
        }
        return given if self._label_folder is None else {**given, **read_labels(self._label_folder / LABELS_FILE)}

    def examples(self, layer: int, feature: int) -> dict[str, Any] | None:
        """A feature's examples; None if there are none."""
        record = None if self.files is None else self.files.read(layer, feature)
        return None if record is None else with_pictures(record, self._picture_folders)


_PROMPT = re.compile(rb'"prompt"\s*:\s*("(?:[^"\\]|\\.)*")')
_SCAN = re.compile(rb'"scan"\s*:\s*("(?:[^"\\]|\\.)*")')


def _entry(path: Path, slug: str) -> Entry:
    """Prompt and model without reading the edges: a JSON graph may be gigabytes."""
    if path.is_dir():
        try:
            about = json.loads((path / GRAPH_JSON).read_bytes())
            return Entry(slug, path, str(about["prompt"]), str(about.get("model") or ""))
        except (ValueError, KeyError, TypeError) as error:
            raise GraphError(f"{GRAPH_JSON} is not of this version's format ({error})") from None
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if b'"metadata"' not in head and b'"nodes"' not in head:
        raise GraphError("no graph: it has neither metadata nor nodes")
    return Entry(slug, path, _first(_PROMPT, head), _first(_SCAN, head))


def _first(pattern: re.Pattern[bytes], head: bytes) -> str:
    found = pattern.search(head)
    try:
        return str(json.loads(found[1])) if found else ""
    except ValueError:
        return ""  # only the list of graphs shows it; opening the graph says what is wrong
