"""circuit-tracer's and Neuronpedia's graph files: JSON per graph, and `graph-metadata.json` beside them.

Written are the kept nodes and edges of a pruned graph, as circuit-tracer 0.4.1 writes them, but for one thing: its ids
of error nodes (`0_{layer}_{position}`) are also those of layer 0's first features, and links then go to the wrong node.
Ours are `{layer}_-1_{position}`, which readers that take ids apart into three integers still can. The bias node is left
out, as there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from clt.attribution.graph import AttributionGraph
from clt.attribution.prune import PrunedGraph
from clt.config.base import write_text_atomically
from clt.errors import GraphError
from clt.types import FeatureId

METADATA = "graph-metadata.json"
FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
EMBEDDING, LOGIT = "embedding", "logit"
_LARGEST_EXACT = 2**53
"""Numbers beyond this are not exact in JavaScript, where `feature` is read."""


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
            "feature_type": ERROR,
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
            "feature_type": EMBEDDING,
            "jsNodeId": f"E_{token}-{position}",
            **common,
        }
    return {**common, **_logit(graph, number - graph.first_target)}


def _feature(graph: AttributionGraph, number: int) -> dict[str, Any]:
    layer, position, feature = graph.features[number].tolist()
    code = FeatureId(layer, feature).number
    if code >= _LARGEST_EXACT:
        raise GraphError(f"Feature {feature} of layer {layer} has the number {code}, beyond what JavaScript can read.")
    return {
        "node_id": f"{layer}_{feature}_{position}",
        "feature": code,
        "layer": str(layer),
        "ctx_idx": position,
        "feature_type": FEATURE,
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
        "feature_type": LOGIT,
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
