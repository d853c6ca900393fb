"""Reading graph JSON of circuit-tracer, Neuronpedia or ours: the kept nodes and edges; what was pruned is gone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clt.attribution.circuit_tracer_json import EMBEDDING, ERROR, FEATURE, LOGIT
from clt.attribution.graph import AttributionGraph, Edges, Position, TargetNode
from clt.errors import GraphError
from clt.types import FeatureId


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


@dataclass(frozen=True)
class _Nodes:
    """The nodes of a file by kind, features and logits in our order."""

    features: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    embeddings: list[dict[str, Any]]
    logits: list[dict[str, Any]]
    places: list[tuple[int, int, int]]
    """Layer, position, feature of each feature node."""
    n_layers: int

    @classmethod
    def of(cls: type[_Nodes], described: dict[str, Any]) -> _Nodes:
        """Sort the nodes of a file."""
        kinds: dict[str, list[dict[str, Any]]] = {FEATURE: [], ERROR: [], EMBEDDING: [], LOGIT: []}
        for node in described["nodes"]:
            kinds.setdefault(node["feature_type"], []).append(node)
        version = described["metadata"].get("schema_version", 0)
        placed = sorted(((_place(node, version), node) for node in kinds[FEATURE]), key=lambda pair: pair[0])
        layers = [int(node["layer"]) for node in kinds[FEATURE] + kinds[ERROR]]
        logits = sorted(kinds[LOGIT], key=lambda node: -node["token_prob"])
        places, features = [place for place, _ in placed], [node for _, node in placed]
        return cls(features, kinds[ERROR], kinds[EMBEDDING], logits, places, 1 + max(layers, default=0))

    def numbers(self, n_positions: int) -> dict[str, int]:
        """Our number of every node id."""
        numbers = {node["node_id"]: number for number, node in enumerate(self.features)}
        first_embedding = len(self.features) + self.n_layers * n_positions
        for node in self.embeddings:
            numbers[node["node_id"]] = first_embedding + node["ctx_idx"]
        for place, node in enumerate(self.logits):
            numbers[node["node_id"]] = first_embedding + n_positions + place
        # Errors last: where their ids are also features' (circuit-tracer's files), links mean the feature.
        for node in self.errors:
            number = len(self.features) + int(node["layer"]) * n_positions + node["ctx_idx"]
            numbers.setdefault(node["node_id"], number)
        return numbers


def _graph_of(described: dict[str, Any]) -> AttributionGraph:
    metadata, nodes = described["metadata"], _Nodes.of(described)
    positions = _positions(metadata, nodes.embeddings)
    numbers = nodes.numbers(len(positions))
    edges = _edges_of(described["links"], numbers, nodes, len(positions))
    table = torch.tensor(nodes.places, dtype=torch.int64).reshape(-1, 3)
    activations = torch.tensor([float(node.get("activation") or 0.0) for node in nodes.features])
    graph = AttributionGraph(
        features=table,
        activations=activations,
        positions=positions,
        targets=[
            TargetNode(_token_of(node), node["feature"], node["token_prob"], node["ctx_idx"]) for node in nodes.logits
        ],
        edges=edges,
        row_value=edges.sums(edges.weight),
        active_features=table,
        active_values=activations,
        n_layers=nodes.n_layers,
        prompt=metadata["prompt"],
        info=_info_of(metadata, nodes),
    )
    cumulative = torch.ones(graph.n_nodes)
    for node in described["nodes"]:
        if node.get("influence") is not None:
            cumulative[numbers[node["node_id"]]] = float(node["influence"])
    graph.__dict__["cumulative"] = cumulative
    return graph


def _place(node: dict[str, Any], version: int) -> tuple[int, int, int]:
    """Layer, position and feature; before schema version 1 the number was layer * 100,000 + feature."""
    layer, feature = FeatureId.from_number(node["feature"]) if version >= 1 else divmod(node["feature"], 100_000)
    if str(layer) != str(node["layer"]):
        raise ValueError(f"node {node['node_id']} is of layer {node['layer']}, but its number says {layer}")
    return layer, node["ctx_idx"], feature


def _positions(metadata: dict[str, Any], embeddings: Sequence[dict[str, Any]]) -> list[Position]:
    tokens = {node["ctx_idx"]: int(node["node_id"].split("_")[1]) for node in embeddings}
    return [Position(tokens.get(place, -1), text, "text") for place, text in enumerate(metadata["prompt_tokens"])]


def _token_of(node: dict[str, Any]) -> str:
    """What is between the first and the last quote of a logit's label."""
    label = str(node["clerp"]).rpartition("(p=")[0]
    return label.partition('"')[2].rpartition('"')[0]


def _edges_of(links: Sequence[dict[str, Any]], numbers: dict[str, int], nodes: _Nodes, n_positions: int) -> Edges:
    n_features, n_targets = len(nodes.features), len(nodes.logits)
    first_target = n_features + (nodes.n_layers + 1) * n_positions
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


def _info_of(metadata: dict[str, Any], nodes: _Nodes) -> dict[str, Any]:
    labelled = [(place, node) for place, node in zip(nodes.places, nodes.features) if node.get("clerp")]
    labels = {f"{layer}/{feature}": node["clerp"] for (layer, _, feature), node in labelled}
    fingerprint = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    return {
        "slug": metadata["slug"],
        "model": str(metadata.get("scan", "")),
        "scan": str(metadata.get("scan", "")),
        "options": {"unselected": "drop", **metadata.get("generation_settings", {})},
        "labels": labels,
        "imported": {"metadata": metadata, "sha256": fingerprint},
    }
