"""circuit-tracer's and Neuronpedia's graph files: JSON per graph, and `graph-metadata.json` beside them.

Written are the kept nodes and edges of a pruned graph, as circuit-tracer 0.4.1 writes them, but for one thing: its ids
of error nodes (`0_{layer}_{position}`) are also those of layer 0's first features, and links then go to the wrong node.
Ours are `{layer}_-1_{position}`, which readers that take ids apart into three integers still can. The bias node is left
out, as there. Read back are nodes and edges; what was pruned is gone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clt.attribution.graph import AttributionGraph, Edges, Position, TargetNode
from clt.attribution.prune import PrunedGraph
from clt.config.base import write_text_atomically
from clt.errors import GraphError

METADATA = "graph-metadata.json"
_FEATURE, _ERROR = "cross layer transcoder", "mlp reconstruction error"
_EMBEDDING, _LOGIT = "embedding", "logit"
_LARGEST_EXACT = 2**53
"""Numbers beyond this are not exact in JavaScript, where `feature` is read."""


def cantor(layer: int, feature: int) -> int:
    """One number for a layer and a feature, as those projects' files use it."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def cantor_inverse(number: int) -> tuple[int, int]:
    """Layer and feature of a number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def write_circuit_tracer_json(
    pruned: PrunedGraph,
    folder: str | Path,
    *,
    slug: str | None = None,
    scan: str | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    info: dict[str, Any] | None = None,
) -> Path:
    """Write `{slug}.json` and add it to `graph-metadata.json`; returns the graph's file.

    Args:
        scan: what the pages look features up by: a Neuronpedia model id to upload there, a folder for circuit-tracer's
            local pages; None: the graph's own.
        node_threshold: what the graph was pruned with, shown by the pages.
        info: further keys of the metadata, such as `feature_details` and `info` of Neuronpedia's schema.
    """
    graph, folder = pruned.graph, Path(folder)
    name = slug or str(graph.info.get("slug", "graph"))
    metadata = {
        "slug": name,
        "scan": scan or str(graph.info.get("scan", "")),
        "transcoder_list": [],
        "prompt_tokens": [position.text for position in graph.positions],
        "prompt": graph.prompt,
        "node_threshold": node_threshold,
        "schema_version": 1,
        "generation_settings": _settings(graph),
        "pruning_settings": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
        **(info or {}),
    }
    described = {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        **nodes_and_links(pruned),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_text_atomically(path, json.dumps(described, ensure_ascii=False, indent=2))
    _add_to_metadata(folder / METADATA, metadata)
    return path


def nodes_and_links(pruned: PrunedGraph) -> dict[str, Any]:
    """Kept nodes and links; features and errors without a link are left out."""
    graph = pruned.graph
    rows, sources = graph.edges.row[pruned.kept_edges], graph.edges.source[pruned.kept_edges].long()
    targets, weights = graph.row_nodes[rows], graph.edges.weight[pruned.kept_edges]
    linked = torch.zeros(graph.n_nodes, dtype=torch.bool)
    linked[sources], linked[targets] = True, True
    linked[graph.first_embedding : graph.bias] = True
    shown = (linked[: graph.bias] & pruned.node_mask).nonzero().squeeze(1).tolist()
    nodes = {number: describe_node(graph, number) for number in shown}
    links = [
        {"source": nodes[source]["node_id"], "target": nodes[target]["node_id"], "weight": weight}
        for source, target, weight in zip(sources.tolist(), targets.tolist(), weights.tolist())
        if source in nodes and target in nodes
    ]
    return {"nodes": list(nodes.values()), "links": links}


def describe_node(graph: AttributionGraph, number: int) -> dict[str, Any]:
    """One node as those projects describe it."""
    common = {
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": "",
        "influence": float(graph.cumulative[number]),
        "activation": None,
    }
    if number < graph.n_features:
        return {**common, **_feature(graph, number)}
    if number < graph.first_embedding:
        layer, position = divmod(number - graph.first_error, graph.n_positions)
        return {
            "node_id": f"{layer}_-1_{position}",
            "feature": -1,
            "layer": str(layer),
            "ctx_idx": position,
            "feature_type": _ERROR,
            "jsNodeId": f"{layer}_{position}-0",
            **common,
        }
    if number < graph.first_target:
        position = number - graph.first_embedding
        token = graph.positions[position].token_id
        return {
            "node_id": f"E_{token}_{position}",
            "feature": position,
            "layer": "E",
            "ctx_idx": position,
            "feature_type": _EMBEDDING,
            "jsNodeId": f"E_{token}-{position}",
            **common,
        }
    return {**common, **_logit(graph, number - graph.first_target)}


def _feature(graph: AttributionGraph, number: int) -> dict[str, Any]:
    layer, position, feature = graph.features[number].tolist()
    code = cantor(layer, feature)
    if code >= _LARGEST_EXACT:
        raise GraphError(f"Feature {feature} of layer {layer} has the number {code}, beyond what JavaScript can read.")
    return {
        "node_id": f"{layer}_{feature}_{position}",
        "feature": code,
        "layer": str(layer),
        "ctx_idx": position,
        "feature_type": _FEATURE,
        "jsNodeId": f"{layer}_{feature}-0",
        "clerp": str(graph.info.get("labels", {}).get(f"{layer}/{feature}", "")),
        "activation": float(graph.activations[number]),
    }


def _logit(graph: AttributionGraph, place: int) -> dict[str, Any]:
    target, layer = graph.targets[place], graph.n_layers + 1
    return {
        "node_id": f"{layer}_{target.token_id}_{target.position}",
        "feature": target.token_id,
        "layer": str(layer),
        "ctx_idx": target.position,
        "feature_type": _LOGIT,
        "jsNodeId": f"L_{target.token_id}-{target.position}",
        # The pages split this at `(p=` and take what is between the first quotes as the token.
        "clerp": f'Output "{target.text}" (p={target.probability:.3f})',
        "token_prob": target.probability,
        "is_target_logit": place == 0,
        "influence": None,
    }


def _settings(graph: AttributionGraph) -> dict[str, Any]:
    options = graph.info.get("options", {})
    names = ("max_n_logits", "desired_logit_prob", "batch_size", "max_feature_nodes")
    return {name: options[name] for name in names if options.get(name) is not None}


def _add_to_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Put a graph into the list of graphs, in place of one of the same slug."""
    graphs = []
    if path.exists():
        try:
            graphs = json.loads(path.read_text(encoding="utf-8"))["graphs"]
        except (ValueError, KeyError, TypeError) as error:
            raise GraphError(
                f"{path} is no list of graphs ({error!r}). Move it away or choose another folder."
            ) from None
    graphs = [graph for graph in graphs if graph.get("slug") != metadata["slug"]] + [metadata]
    write_text_atomically(path, json.dumps({"graphs": graphs}, ensure_ascii=False, indent=2))


def read_circuit_tracer_json(path: str | Path) -> AttributionGraph:
    """A graph of circuit-tracer's, Neuronpedia's or ours from its JSON: the nodes and edges that were kept.

    What pruning left out is not in such a file, so rows do not add up; `row_value` is what they do add up to, and
    influences are those of the kept part, except that `cumulative` is taken from the file.

    Raises:
        GraphError: not such a file, or a link to a node that is not there.
    """
    path = Path(path)
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        return _graph_of(described)
    except FileNotFoundError:
        raise GraphError(f"{path} does not exist.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise GraphError(
            f"{path} is no graph of circuit-tracer or Neuronpedia ({error!r}). It needs metadata, nodes and links."
        ) from None


def _graph_of(described: dict[str, Any]) -> AttributionGraph:
    metadata, nodes = described["metadata"], described["nodes"]
    of_kind: dict[str, list[dict[str, Any]]] = {_FEATURE: [], _ERROR: [], _EMBEDDING: [], _LOGIT: []}
    for node in nodes:
        of_kind.setdefault(node["feature_type"], []).append(node)
    version = metadata.get("schema_version", 0)
    places = [(*_layer_and_feature(node, version), node["ctx_idx"]) for node in of_kind[_FEATURE]]
    order = sorted(range(len(places)), key=lambda i: (places[i][0], places[i][2], places[i][1]))
    features = [(places[i][0], places[i][2], places[i][1]) for i in order]
    n_layers = 1 + max(
        [layer for layer, _, _ in features] + [int(node["layer"]) for node in of_kind[_ERROR]], default=0
    )
    positions = _positions(metadata, of_kind[_EMBEDDING])
    numbers = {of_kind[_FEATURE][i]["node_id"]: number for number, i in enumerate(order)}
    first_embedding = len(features) + n_layers * len(positions)
    logits = sorted(of_kind[_LOGIT], key=lambda node: -node["token_prob"])
    # Errors last: where their ids collide with features' (circuit-tracer's files), links mean the feature.
    for node in of_kind[_EMBEDDING]:
        numbers[node["node_id"]] = first_embedding + node["ctx_idx"]
    for place, node in enumerate(logits):
        numbers[node["node_id"]] = first_embedding + len(positions) + place
    for node in of_kind[_ERROR]:
        number = len(features) + int(node["layer"]) * len(positions) + node["ctx_idx"]
        numbers.setdefault(node["node_id"], number)
    edges = _edges_of(described["links"], numbers, len(features), first_embedding + len(positions), len(logits))
    table = torch.tensor(features, dtype=torch.int64).reshape(-1, 3)
    activations = torch.tensor([float(of_kind[_FEATURE][i].get("activation") or 0.0) for i in order])
    graph = AttributionGraph(
        features=table,
        activations=activations,
        positions=positions,
        targets=[TargetNode(_token_of(node), node["feature"], node["token_prob"], node["ctx_idx"]) for node in logits],
        edges=edges,
        row_value=edges.sums(edges.weight),
        active_features=table,
        active_values=activations,
        n_layers=n_layers,
        prompt=metadata["prompt"],
        info=_info_of(metadata, of_kind[_FEATURE], places),
    )
    cumulative = torch.ones(graph.n_nodes)
    for node in nodes:
        if node.get("influence") is not None:
            cumulative[numbers[node["node_id"]]] = float(node["influence"])
    graph.__dict__["cumulative"] = cumulative
    return graph


def _layer_and_feature(node: dict[str, Any], version: int) -> tuple[int, int]:
    """From the node's number; before schema version 1 that was layer * 100,000 + feature."""
    layer, feature = cantor_inverse(node["feature"]) if version >= 1 else divmod(node["feature"], 100_000)
    if str(layer) != str(node["layer"]):
        raise ValueError(f"node {node['node_id']} is of layer {node['layer']}, but its number says {layer}")
    return layer, feature


def _positions(metadata: dict[str, Any], embeddings: Sequence[dict[str, Any]]) -> list[Position]:
    tokens = {node["ctx_idx"]: int(node["node_id"].split("_")[1]) for node in embeddings}
    return [Position(tokens.get(place, -1), text, "text") for place, text in enumerate(metadata["prompt_tokens"])]


def _token_of(node: dict[str, Any]) -> str:
    """What is between the first and the last quote of a logit's label."""
    label = str(node["clerp"]).rpartition("(p=")[0]
    return label.partition('"')[2].rpartition('"')[0]


def _edges_of(
    links: Sequence[dict[str, Any]], numbers: dict[str, int], n_features: int, first_target: int, n_targets: int
) -> Edges:
    entries = []
    for link in links:
        target, source = numbers[link["target"]], numbers[link["source"]]
        row = target if target < n_features else n_features + target - first_target
        entries.append((row, source, float(link["weight"])))
    entries.sort()
    counts = torch.bincount(torch.tensor([row for row, _, _ in entries]).long(), minlength=n_features + n_targets)
    return Edges(
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        torch.tensor([source for _, source, _ in entries], dtype=torch.int32),
        torch.tensor([weight for _, _, weight in entries], dtype=torch.float32),
    )


def _info_of(
    metadata: dict[str, Any], features: Sequence[dict[str, Any]], places: Sequence[tuple[int, int, int]]
) -> dict[str, Any]:
    labels = {
        f"{layer}/{feature}": node["clerp"] for node, (layer, feature, _) in zip(features, places) if node.get("clerp")
    }
    fingerprint = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    return {
        "slug": metadata["slug"],
        "model": str(metadata.get("scan", "")),
        "scan": str(metadata.get("scan", "")),
        "options": {"unselected": "drop", **metadata.get("generation_settings", {})},
        "labels": labels,
        "imported": {"metadata": metadata, "sha256": fingerprint},
    }
