"""A graph as a page shows it: nodes as columns, and the few questions a page asks about edges.

The same object stands before any file a graph may come from (see view_files.py). Edges stay in arrays here; a page
asks for those of one node, those among some nodes, or the strongest, so 9 million of them never reach a browser.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8
from numpy import ndarray

FEATURE, ERROR, EMBEDDING, LOGIT, BIAS = range(5)
"""Kinds of nodes; web/src/lib/types.ts has the same numbers."""
OVERVIEW_EDGES = 1500
MOST_LINKS = 1200
"""A node's links are cut off here; count and total are of all."""
_LEAST_SUM = 1e-10


@dataclass(frozen=True, kw_only=True)
class NodeTable:
    """One entry per node; NaN where a number is not known."""

    id: Sequence[str]
    kind: UInt8[ndarray, " node"]
    layer: Int64[ndarray, " node"]
    """-1 for embeddings and the bias, the number of layers for logits."""
    position: Int64[ndarray, " node"]
    feature: Int64[ndarray, " node"]
    """-1 where the node is no feature."""
    activation: Float64[ndarray, " node"]
    cumulative: Float64[ndarray, " node"]
    """Share of all influence of this node and all stronger ones; 0 for embeddings and logits, which always show."""
    probability: Float64[ndarray, " node"]
    label: Sequence[str]

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns as JSON has them."""
        return {
            "id": list(self.id),
            "kind": self.kind.tolist(),
            "layer": self.layer.tolist(),
            "position": self.position.tolist(),
            "feature": self.feature.tolist(),
            "activation": _rounded(self.activation, 4),
            "influence": _rounded(self.cumulative, 6),
            "probability": _rounded(self.probability, 6),
            "label": list(self.label),
        }


class Patch(NamedTuple):
    """Where on an image one position of the prompt lies; left, top, width, height as shares of the image's size.

    `group` is the position whose embedding node stands for it: its own, unless alike patches were made one node.
    """

    position: int
    row: int
    column: int
    left: float
    top: float
    width: float
    height: float
    group: int


@dataclass(frozen=True, kw_only=True)
class ViewImage:
    """An image of the prompt."""

    data: bytes
    """The file's content, PNG or JPEG."""
    media_type: str
    width: int
    height: int
    patches: Sequence[Patch]

    def to_dict(self) -> dict[str, Any]:
        """With the file's content as a data URL."""
        source = f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"
        patches = [list(patch) for patch in self.patches]
        return {"src": source, "width": self.width, "height": self.height, "patches": patches}


@dataclass(frozen=True)
class EdgeTable:
    """Edges sorted by target: those into node n are `start[n]` to `start[n + 1] - 1`."""

    start: Int64[ndarray, " node_and_end"]
    source: ndarray
    weight: ndarray

    @classmethod
    def from_pairs(cls, source: ndarray, target: ndarray, weight: ndarray, n_nodes: int) -> EdgeTable:
        """From edges in any order."""
        order = np.argsort(target, kind="stable")
        start = np.zeros(n_nodes + 1, dtype=np.int64)
        np.cumsum(np.bincount(target, minlength=n_nodes), out=start[1:])
        return cls(start, source[order].astype(np.int32), weight[order].astype(np.float32))

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def target(self) -> ndarray:
        """The node every edge goes to."""
        return np.repeat(np.arange(len(self.start) - 1, dtype=np.int32), np.diff(self.start))

    @cached_property
    def totals(self) -> Float64[ndarray, " node"]:
        """Sum of absolute weights into each node."""
        return np.bincount(self.target, np.abs(self.weight), minlength=len(self.start) - 1)

    @cached_property
    def by_source(self) -> tuple[ndarray, ndarray]:
        """[start, edges]: the numbers of the edges out of node n are `edges[start[n] : start[n + 1]]`."""
        start = np.zeros(len(self.start), dtype=np.int64)
        np.cumsum(np.bincount(self.source, minlength=len(self.start) - 1), out=start[1:])
        return start, np.argsort(self.source, kind="stable").astype(np.int32)

    def share(self, edges: ndarray) -> ndarray:
        """Weights over the sum of absolute weights into the same target."""
        return self.weight[edges] / np.maximum(self.totals[self.target[edges]], _LEAST_SUM)

    def to_dict(self, edges: ndarray) -> dict[str, list[Any]]:
        """Some edges as a page reads them."""
        return {
            "source": self.source[edges].tolist(),
            "target": self.target[edges].tolist(),
            "weight": _rounded(self.weight[edges], 6),
            "share": _rounded(self.share(edges), 6),
        }


@dataclass(frozen=True, kw_only=True)
class GraphView:
    """A graph, whatever file it was read from."""

    slug: str
    prompt: str
    model: str
    n_layers: int
    tokens: Sequence[str]
    token_ids: Sequence[int] = ()
    """Of all tokens; empty where the file does not say."""
    nodes: NodeTable
    edges: EdgeTable
    scores: dict[str, float] = field(default_factory=dict)
    images: Sequence[ViewImage] = ()
    labels: dict[str, str] = field(default_factory=dict)
    """Labels the file came with: "layer/feature" -> text."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What a reader had added when the file was written; see notes.py."""
    threshold: float | None = None
    """Cumulative influence up to which nodes are shown at first."""

    @property
    def n_nodes(self) -> int:
        """All nodes."""
        return len(self.nodes.id)

    def links(self, node: int) -> dict[str, Any]:
        """The strongest edges into and out of one node."""
        inputs = np.arange(self.edges.start[node], self.edges.start[node + 1])
        start, order = self.edges.by_source
        outputs = order[start[node] : start[node + 1]]
        return {
            "inputs": self._side(inputs, self.edges.source),
            "outputs": self._side(outputs, self.edges.target),
        }

    def _side(self, edges: ndarray, other: ndarray) -> dict[str, Any]:
        sizes = np.abs(self.edges.weight[edges])
        strongest = edges[np.argsort(-sizes, kind="stable")[:MOST_LINKS]]
        return {
            "node": other[strongest].tolist(),
            "weight": _rounded(self.edges.weight[strongest], 6),
            "count": len(edges),
            "total": float(sizes.sum()),
        }

    def among(self, nodes: Sequence[int]) -> dict[str, list[Any]]:
        """The edges whose two ends are both among these nodes."""
        wanted = np.zeros(self.n_nodes, dtype=bool)
        wanted[list(nodes)] = True
        parts = [np.arange(self.edges.start[node], self.edges.start[node + 1]) for node in sorted(set(nodes))]
        edges = np.concatenate([*parts, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        return self.edges.to_dict(edges[wanted[self.edges.source[edges]]])

    @cached_property
    def edge_scores(self) -> ndarray:
        """Each edge's share of its target's input, times the target's influence (its own weight for a logit)."""
        return self._shares * (self.influence + self._start)[self.edges.target]

    def strongest(self, count: int) -> ndarray:
        """The numbers of the edges with the highest scores, best first."""
        count = min(count, len(self.edges))
        if not count:
            return np.zeros(0, dtype=np.int64)
        chosen = np.argpartition(-self.edge_scores, count - 1)[:count]
        return chosen[np.argsort(-self.edge_scores[chosen], kind="stable")]

    def overview(self) -> dict[str, list[Any]]:
        """The strongest edges of the graph, best first."""
        return self.edges.to_dict(self.strongest(OVERVIEW_EDGES))

    @property
    def _shares(self) -> ndarray:
        return np.abs(self.edges.weight) / np.maximum(self.edges.totals, _LEAST_SUM)[self.edges.target]

    @property
    def _start(self) -> Float64[ndarray, " node"]:
        return np.where(self.nodes.kind == LOGIT, np.nan_to_num(self.nodes.probability, nan=1.0), 0.0)

    @cached_property
    def influence(self) -> Float64[ndarray, " node"]:
        """w N + w N² + ... over this graph's edges (see prune.py); 0 for logits."""
        shares = self._shares
        through, total = self._start, np.zeros(self.n_nodes)
        for _ in range(self.n_layers + 2):
            through = np.bincount(self.edges.source, shares * through[self.edges.target], minlength=self.n_nodes)
            if not through.any():
                break
            total += through
        return total

    def to_dict(self) -> dict[str, Any]:
        """Everything about the graph but its edges and its readers' notes."""
        return {
            "slug": self.slug,
            "prompt": self.prompt,
            "model": self.model,
            "n_layers": self.n_layers,
            "tokens": list(self.tokens),
            "nodes": self.nodes.to_dict(),
            "n_edges": len(self.edges),
            "n_edges_here": len(self.edges),
            "scores": self.scores,
            "threshold": self.threshold,
            "images": [image.to_dict() for image in self.images],
        }


def cumulative_of(influence: Float64[ndarray, " node"], always: Bool[ndarray, " node"]) -> Float64[ndarray, " node"]:
    """Share of the total held by each node and all that have more; 0 for nodes that always show."""
    order = np.argsort(-influence, kind="stable")
    cumulative = np.zeros(len(influence))
    cumulative[order] = np.cumsum(influence[order]) / max(float(influence.sum()), _LEAST_SUM)
    return np.where(always, 0.0, cumulative)


def _rounded(values: ndarray, digits: int) -> list[float | None]:
    """To `digits` significant digits; null for NaN."""
    return [None if value != value else float(f"{value:.{digits}g}") for value in values.tolist()]
