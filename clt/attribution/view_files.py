"""Opening graphs for a page: our folders, and graph JSON of circuit-tracer, Neuronpedia and EleutherAI.

Nothing here needs torch or the whole graph object: arrays are read as they lie in the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from clt.attribution.view import (
    BIAS,
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    EdgeTable,
    GraphView,
    NodeTable,
    Patch,
    ViewImage,
    cumulative_of,
)
from clt.errors import GraphError
from clt.types import FeatureId

GRAPH_JSON, GRAPH_TENSORS = "graph.json", "graph.safetensors"
_DEFAULT_THRESHOLD = 0.8


def open_view(path: Path, slug: str | None = None) -> GraphView:
    """A graph folder, or a graph JSON file.

    Raises:
        GraphError: the file is missing, cut off, or no graph.
    """
    if path.is_dir():
        return _open_folder(path, slug or path.name)
    return view_of_json(_read_json(path), slug or path.stem, str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise GraphError(f"{path} does not exist. A graph is a folder with {GRAPH_JSON}, or a JSON file.") from None
    except ValueError as error:
        raise GraphError(f"{path} is no whole JSON file ({error}). Copy it again.") from None
    if not isinstance(content, dict):
        raise GraphError(f"{path} holds a JSON {type(content).__name__} where a graph is an object.")
    return content


# --- our own folders (docs/attribution.md) ------------------------------------------------------------------------


def _open_folder(folder: Path, slug: str) -> GraphView:
    about = _read_json(folder / GRAPH_JSON)
    try:
        tensors = load_file(folder / GRAPH_TENSORS)
    except FileNotFoundError:
        raise GraphError(f"{folder} has no {GRAPH_TENSORS}. Copy the whole folder.") from None
    except SafetensorError as error:
        raise GraphError(f"{folder / GRAPH_TENSORS} is no whole safetensors file ({error}). Copy it again.") from None
    try:
        return _view_of_folder(folder, about, tensors, slug)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise GraphError(
            f"{folder} is no graph of the format this version reads: {type(error).__name__} {error}. Compute it again."
        ) from error


def _view_of_folder(folder: Path, about: Mapping[str, Any], tensors: Mapping[str, ndarray], slug: str) -> GraphView:
    positions, targets, n_layers = about["positions"], about["targets"], about["n_layers"]
    nodes = _own_nodes(about, tensors)
    n_features = len(tensors["features"])
    first_target = n_features + (n_layers + 1) * len(positions)
    rows = np.concatenate([np.arange(n_features), first_target + np.arange(len(targets))])
    counts = np.zeros(len(nodes.id), dtype=np.int64)
    counts[rows] = np.diff(tensors["row_start"])
    # Rows are in the order of their nodes, so only the starts of nodes without a row are to be filled in.
    start = np.concatenate([[0], np.cumsum(counts)])
    view = GraphView(
        slug=slug,
        prompt=about["prompt"],
        model=str(about.get("model") or ""),
        n_layers=n_layers,
        tokens=[position["text"] for position in positions],
        token_ids=[position["token_id"] for position in positions],
        nodes=nodes,
        edges=EdgeTable(start, tensors["source"], tensors["weight"]),
        scores=dict(about.get("checks", {}).get("scores", {})),
        images=_own_images(folder, about),
        labels=dict(about.get("labels", {})),
        threshold=_DEFAULT_THRESHOLD,
    )
    view.__dict__["influence"] = tensors["influence"].astype(np.float64)
    return without_empty_nodes(view, [p for p, place in enumerate(positions) if place.get("group", p) not in (p, None)])


def _own_nodes(about: Mapping[str, Any], tensors: Mapping[str, ndarray]) -> NodeTable:
    """Features, errors layer by layer, embeddings, targets, bias: the order of docs/attribution.md."""
    features, n_layers = tensors["features"].astype(np.int64), about["n_layers"]
    positions, targets = about["positions"], about["targets"]
    n_features, n_positions, n_targets = len(features), len(positions), len(targets)
    sizes = [n_features, n_layers * n_positions, n_positions, n_targets, 1]
    kind = np.repeat(np.array([FEATURE, ERROR, EMBEDDING, LOGIT, BIAS], dtype=np.uint8), sizes)
    each, places = np.arange(n_positions), [target["position"] for target in targets]
    layer = [features[:, 0], np.repeat(np.arange(n_layers), n_positions), np.full(n_positions, -1)]
    position = [features[:, 1], np.tile(each, n_layers), each, np.array(places, dtype=np.int64), [0]]
    nothing = np.full(sum(sizes) - n_features, np.nan)
    probability = np.full(sum(sizes), np.nan)
    probability[kind == LOGIT] = [target["probability"] for target in targets]
    always = (kind == EMBEDDING) | (kind == LOGIT) | (kind == BIAS)
    ids = [f"{l}_{f}_{p}" for l, p, f in features.tolist()]  # noqa: E741
    ids += [f"{l}_-1_{p}" for l in range(n_layers) for p in range(n_positions)]  # noqa: E741
    ids += [f"E_{place['token_id']}_{p}" for p, place in enumerate(positions)]
    ids += [f"{n_layers + 1}_{target['token_id']}_{target['position']}" for target in targets]
    return NodeTable(
        id=[*ids, "bias"],
        kind=kind,
        layer=np.concatenate([*layer, np.full(n_targets, n_layers), [-1]]).astype(np.int64),
        position=np.concatenate(position).astype(np.int64),
        feature=np.concatenate([features[:, 2], np.full(len(nothing), -1)]),
        activation=np.concatenate([tensors["activations"].astype(np.float64), nothing]),
        cumulative=np.where(always, 0.0, tensors["cumulative"].astype(np.float64)),
        probability=probability,
        label=[*[""] * (sum(sizes) - n_targets - 1), *[target["text"] for target in targets], ""],
    )


def _own_images(folder: Path, about: Mapping[str, Any]) -> list[ViewImage]:
    images = []
    for number, image in enumerate(about.get("images", [])):
        width, height = image["width"], image["height"]
        patches = []
        for position, place in enumerate(about["positions"]):
            patch = place.get("patch")
            if patch is not None and patch["image"] == number:
                left, top, right, bottom = patch["box"]
                box = (left / width, top / height, (right - left) / width, (bottom - top) / height)
                group = place.get("group")
                patches.append(
                    Patch(position, patch["row"], patch["column"], *box, position if group is None else group)
                )
        name = Path(image["file"]).name  # never a path out of the folder
        data = (folder / name).read_bytes()
        images.append(ViewImage(data=data, media_type="image/png", width=width, height=height, patches=patches))
    return images


def without_empty_nodes(view: GraphView, grouped: Sequence[int] = ()) -> GraphView:
    """Leave out error nodes that no edge leaves: a long prompt has tens of thousands of places without any.

    Args:
        grouped: positions whose embedding node is that of another.
    """
    used = np.bincount(view.edges.source, minlength=view.n_nodes) > 0
    is_other = (view.nodes.kind == EMBEDDING) & np.isin(view.nodes.position, list(grouped))
    keep = used | ((view.nodes.kind != ERROR) & ~is_other)
    if keep.all():
        return view
    moved = np.cumsum(keep) - 1
    nodes = view.nodes
    chosen = np.flatnonzero(keep).tolist()
    columns = ("kind", "layer", "position", "feature", "activation", "cumulative", "probability")
    kept: dict[str, Any] = {name: getattr(nodes, name)[keep] for name in columns}
    table = NodeTable(id=[nodes.id[n] for n in chosen], label=[nodes.label[n] for n in chosen], **kept)
    start = np.concatenate([view.edges.start[:-1][keep], view.edges.start[-1:]])
    edges = EdgeTable(start, moved[view.edges.source].astype(np.int32), view.edges.weight)
    new = GraphView(**{**_fields(view), "nodes": table, "edges": edges})
    new.__dict__["influence"] = view.influence[keep]
    return new


def _fields(view: GraphView) -> dict[str, Any]:
    return {name: getattr(view, name) for name in GraphView.__dataclass_fields__}


# --- graph JSON of circuit-tracer and Neuronpedia -----------------------------------------------------------------


def view_of_json(content: Mapping[str, Any], slug: str, name: str = "the graph") -> GraphView:
    """A view of `{"metadata", "qParams", "nodes", "links"}`.

    Raises:
        GraphError: keys are missing, or links lead to nodes that are not there.
    """
    for key in ("metadata", "nodes", "links"):
        if key not in content:
            raise GraphError(f"{name} has no {key!r}: it is no graph of circuit-tracer or Neuronpedia.")
    try:
        return _view_of_json(content, slug, name)
    except (KeyError, TypeError, ValueError) as error:
        raise GraphError(
            f"{name} is not what circuit-tracer writes: {type(error).__name__} {error}. Each node needs node_id, "
            "feature_type, layer and ctx_idx, each link source, target and weight."
        ) from error


def _view_of_json(content: Mapping[str, Any], slug: str, name: str) -> GraphView:
    metadata, nodes = content["metadata"], content["nodes"]
    ids = _unambiguous_ids(nodes)
    index = {node_id: number for number, node_id in enumerate(ids)}
    edges = _json_edges(content["links"], index, name)
    is_logit = np.array([node["feature_type"] == "logit" for node in nodes], dtype=bool)
    layers = np.array([_layer_of(node["layer"]) for node in nodes], dtype=np.int64)
    n_layers = int(layers[~is_logit].max(initial=-1)) + 1
    table = _json_nodes(nodes, ids, np.where(is_logit, n_layers, layers))
    view = GraphView(
        slug=slug,
        prompt=str(metadata.get("prompt", "")),
        model=str(metadata.get("scan") or ""),
        n_layers=n_layers,
        tokens=_tokens(metadata, table),
        token_ids=_token_ids(table, len(metadata.get("prompt_tokens", []))),
        nodes=table,
        edges=edges,
        notes=_notes_of(content.get("qParams") or {}),
        threshold=_threshold_of(metadata),
    )
    if np.isnan(table.cumulative).all():
        return GraphView(**{**_fields(view), "nodes": _with_influence(view)})
    return view


def _unambiguous_ids(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """circuit-tracer names the error of layer 3 like feature 3 of layer 0 (its issue 78): then the error is renamed.

    Links name both alike; they are taken to be the feature's.
    """
    features = {str(node["node_id"]) for node in nodes if _kind_of(node) != ERROR}
    return [
        f"{_layer_of(node['layer'])}_-1_{node['ctx_idx']}"
        if _kind_of(node) == ERROR and str(node["node_id"]) in features
        else str(node["node_id"])
        for node in nodes
    ]


def _layer_of(layer: Any) -> int:
    """Layers are strings; embeddings say "E"."""
    return -1 if str(layer) in ("E", "-1") else int(layer)


def _kind_of(node: Mapping[str, Any]) -> int:
    name = str(node["feature_type"]).lower()
    if "error" in name:
        return ERROR
    return {"embedding": EMBEDDING, "logit": LOGIT, "bias": BIAS}.get(name, FEATURE)


def _json_nodes(nodes: Sequence[Mapping[str, Any]], ids: Sequence[str], layers: ndarray) -> NodeTable:
    kind = np.array([_kind_of(node) for node in nodes], dtype=np.uint8)
    always = (kind == EMBEDDING) | (kind == LOGIT) | (kind == BIAS)
    cumulative = np.array([_number(node.get("influence")) for node in nodes])
    probability = np.array([_number(node.get("token_prob")) for node in nodes])
    return NodeTable(
        id=list(ids),
        kind=kind,
        layer=layers,
        position=np.array([int(node["ctx_idx"]) for node in nodes], dtype=np.int64),
        feature=np.array([_feature_of(n, k) for n, k in zip(nodes, kind.tolist(), strict=True)], dtype=np.int64),
        activation=np.array([_number(node.get("activation")) for node in nodes]),
        cumulative=np.where(always & ~np.isnan(cumulative).all(), 0.0, cumulative),
        probability=np.where(kind == LOGIT, probability, np.nan),
        label=[_label_of(n, k) for n, k in zip(nodes, kind.tolist(), strict=True)],
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _feature_of(node: Mapping[str, Any], kind: int) -> int:
    """The feature's number in its layer, from the id (`layer_feature_position`) or unpaired from `feature`."""
    if kind != FEATURE:
        return -1
    parts = str(node["node_id"]).split("_")
    if len(parts) == 3 and parts[1].isdigit():
        return int(parts[1])
    return FeatureId.from_number(int(node["feature"])).feature


_QUOTED = re.compile(r'"(.*)"', re.DOTALL)


def _label_of(node: Mapping[str, Any], kind: int) -> str:
    text = str(node.get("clerp") or "")
    if kind != LOGIT:
        return text
    found = _QUOTED.search(text)
    return found[1] if found else text.split("(p=")[0].strip()


def _json_edges(links: Sequence[Mapping[str, Any]], index: Mapping[str, int], name: str) -> EdgeTable:
    try:
        source = np.array([index[str(link["source"])] for link in links], dtype=np.int64)
        target = np.array([index[str(link["target"])] for link in links], dtype=np.int64)
    except KeyError as error:
        raise GraphError(f"{name} has a link to node {error}, which is not among its nodes. Export it again.") from None
    weight = np.array([float(link["weight"]) for link in links], dtype=np.float32)
    return EdgeTable.from_pairs(source, target, weight, len(index))


def _tokens(metadata: Mapping[str, Any], nodes: NodeTable) -> list[str]:
    """The prompt's tokens; a position that has nodes but no token is named by its number."""
    tokens = [str(token) for token in metadata.get("prompt_tokens", [])]
    missing = range(len(tokens), int(nodes.position.max(initial=-1)) + 1)
    return [*tokens, *(f"#{position}" for position in missing)]


_EMBEDDING_ID = re.compile(r"E_(\d+)_(\d+)")


def _token_ids(nodes: NodeTable, n_tokens: int) -> list[int]:
    """Embeddings' ids say `E_{token}_{position}`; nothing if a position is missing."""
    found = [_EMBEDDING_ID.fullmatch(nodes.id[node]) for node in np.flatnonzero(nodes.kind == EMBEDDING).tolist()]
    by_position = {int(match[2]): int(match[1]) for match in found if match}
    return [by_position[p] for p in range(n_tokens)] if by_position.keys() == set(range(n_tokens)) else []


def _threshold_of(metadata: Mapping[str, Any]) -> float | None:
    threshold = metadata.get("node_threshold")
    return float(threshold) if isinstance(threshold, int | float) else None


def _with_influence(view: GraphView) -> NodeTable:
    """The node table of a graph that came without influence."""
    nodes = view.nodes
    always = (nodes.kind == EMBEDDING) | (nodes.kind == LOGIT) | (nodes.kind == BIAS)
    columns: dict[str, Any] = {name: getattr(nodes, name) for name in NodeTable.__dataclass_fields__}
    return NodeTable(**{**columns, "cumulative": cumulative_of(view.influence, always)})


def _notes_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Pins and supernodes as circuit-tracer's page saves them: lists, or the same as strings."""
    pinned = params.get("pinnedIds") or []
    if isinstance(pinned, str):
        pinned = [each for each in pinned.split(",") if each]
    groups = params.get("supernodes") or []
    if isinstance(groups, str):
        groups = json.loads(groups)
    supernodes = [{"name": str(name), "nodes": [str(node) for node in nodes]} for name, *nodes in groups]
    inside = [node for group in supernodes for node in group["nodes"]]
    return {"pinned": list(dict.fromkeys([*map(str, pinned), *inside])), "supernodes": supernodes}
