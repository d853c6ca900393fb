"""One graph as one HTML file that needs nothing else: no server, no network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from clt.attribution.notes import EMPTY, checked_notes, read_notes
from clt.attribution.view import FEATURE, GraphView
from clt.attribution.view_files import open_view
from clt.discovery.feature_files import FeatureFiles
from clt.discovery.labels import BY_HAND_FILE, LABELS_FILE, FeatureLabel, read_labels
from clt.discovery.pictures import with_pictures

PAGE = resources.files("clt.viz").joinpath("static")
MOST_EDGES = 300_000
"""The strongest edges are kept: 3.6 MB, 4.8 MB as base64."""
MOST_EXAMPLES = 400
"""Features whose examples go into the page, the most influential first."""


def write_graph_page(
    graph: Path,
    page: Path,
    *,
    features: Path | None = None,
    images: Path | None = None,
    max_edges: int = MOST_EDGES,
    max_examples: int = MOST_EXAMPLES,
) -> None:
    """Write the page of a graph folder or graph JSON file.

    Args:
        features: folder of feature examples and labels.
        images: folder of the images that examples name, besides that of the examples.
        max_edges: how many edges the page carries; it says so if there are more.
        max_examples: of how many features it carries the examples.

    Raises:
        GraphError, DatasetError: the graph or the examples cannot be read.
    """
    view = open_view(graph)
    notes = read_notes(graph / "notes.json" if graph.is_dir() else graph.with_name(f"{graph.stem}.notes.json"))
    page.parent.mkdir(parents=True, exist_ok=True)
    limits = {"max_edges": max_edges, "max_examples": max_examples}
    page.write_text(graph_page(view, notes=notes, features=features, images=images, **limits), encoding="utf-8")


def graph_page(
    view: GraphView,
    *,
    notes: Mapping[str, Any] | None = None,
    features: Path | None = None,
    images: Path | None = None,
    max_edges: int = MOST_EDGES,
    max_examples: int = MOST_EXAMPLES,
) -> str:
    """The whole document; arguments as `write_graph_page`."""
    files = None if features is None else FeatureFiles(features)
    explained = {key: FeatureLabel(text=text, source="the graph's file") for key, text in view.labels.items()}
    by_hand: dict[str, str] = {}
    if files is not None:
        explained |= read_labels(files.folder / LABELS_FILE)
        by_hand = {key: label.text for key, label in read_labels(files.folder / BY_HAND_FILE).items()}
    notes = checked_notes({**EMPTY, **view.notes} if notes is None else notes)
    chosen = view.strongest(max_edges)
    content = view.to_dict()
    content["n_edges_here"] = len(chosen)
    content["explained"] = {key: asdict(label) for key, label in explained.items()}
    content["notes"] = {**notes, "labels": {**notes["labels"], **by_hand}}
    content["has_examples"] = files is not None
    folders = [] if files is None else [folder for folder in (images, files.folder) if folder is not None]
    examples = {} if files is None else _examples(view, files, folders, max_examples)
    return _document(view, {"graph": content, "edges": _packed_edges(view, chosen), "examples": examples})


def _packed_edges(view: GraphView, chosen: np.ndarray) -> str:
    """Base64 of little-endian source u4, target u4, weight f4, then the total into each node f4 (see web/src)."""
    edges = view.edges
    arrays = [
        edges.source[chosen].astype("<u4"),
        edges.target[chosen].astype("<u4"),
        edges.weight[chosen].astype("<f4"),
        edges.totals.astype("<f4"),
    ]
    return base64.b64encode(b"".join(array.tobytes() for array in arrays)).decode()


def _examples(view: GraphView, files: FeatureFiles, folders: Sequence[Path], most: int) -> dict[str, Any]:
    nodes = np.flatnonzero(view.nodes.kind == FEATURE)
    nodes = nodes[np.argsort(np.nan_to_num(view.nodes.cumulative[nodes], nan=2.0), kind="stable")]
    pairs = dict.fromkeys((int(view.nodes.layer[node]), int(view.nodes.feature[node])) for node in nodes)
    found: dict[str, Any] = {}
    for layer, feature in pairs:
        if len(found) >= most:
            break
        record = files.read(layer, feature)
        if record is not None:
            found[f"{layer}/{feature}"] = with_pictures(record, folders)
    return found


def _document(view: GraphView, data: Mapping[str, Any]) -> str:
    script = PAGE.joinpath("graphs.js").read_text(encoding="utf-8").replace("</script", "<\\/script")
    style = PAGE.joinpath("graphs.css").read_text(encoding="utf-8")
    # "</" would end the element early, "<!--" would start a comment; in JSON both may be written with an escape.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    title = re.sub(r"[<>&]", " ", view.slug)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{title} · crosslayer</title>\n<style>{style}</style>\n</head>\n<body>\n"
        '<div id="app"></div>\n'
        f'<script type="application/json" id="graph-data">{text}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n</html>\n'
    )
