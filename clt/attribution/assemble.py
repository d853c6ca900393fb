"""From stored rows over all active features to a graph of the selected ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from clt.attribution.graph import AttributionGraph, Edges, Position, TargetNode
from clt.attribution.options import AttributionOptions
from clt.attribution.patch_groups import leaders_of
from clt.attribution.rows import RowStore
from clt.attribution.sources import Sources
from clt.errors import GraphError


def assemble(
    store: RowStore,
    sources: Sources,
    targets: Sequence[TargetNode],
    positions: Sequence[Position],
    prompt: str,
    options: AttributionOptions,
    info: dict[str, Any],
    images: Sequence[Image.Image],
) -> AttributionGraph:
    """Fold or drop the features that have no row, and put the rows in order."""
    active = sources.active
    selected = sorted(row for row in store.row_ids if row < len(active))
    table = torch.stack([active.layer, active.position, active.feature], 1).cpu()
    moved = _new_numbers(sources, selected, leaders_of(positions), len(targets), options)
    edges, values, error = _edges(store, moved, len(selected) + sources.n_columns - len(active) + len(targets) + 1)
    graph = AttributionGraph(
        features=table[selected],
        activations=active.value.cpu()[selected],
        positions=positions,
        targets=targets,
        edges=edges,
        row_value=values,
        active_features=table,
        active_values=active.value.cpu(),
        n_layers=sources.n_layers,
        prompt=prompt,
        info=info,
        images=images,
    )
    checks = {"row_sum_error": error, "n_active": len(active), "n_selected": len(selected)}
    info["checks"] = {**checks, "scores": graph.scores.to_dict()}
    return graph


def _new_numbers(
    sources: Sources, selected: Sequence[int], leaders: Sequence[int], n_targets: int, options: AttributionOptions
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Node number of every stored column; -1 for what is dropped, grouped positions' that of their group's first."""
    active = sources.active
    moved = np.full(sources.n_columns + 1, -1, dtype=np.int64)
    others = sources.n_columns - len(active)
    # Errors layer by layer and then embeddings: one row of positions after the other.
    rows = np.arange(others // sources.n_positions)[:, None] * sources.n_positions
    moved[len(active) : -1] = len(selected) + (rows + np.array(leaders)).ravel()
    if options.unselected == "error":
        place = active.layer * sources.n_positions + active.position
        moved[: len(active)] = moved[len(active) + place.cpu().numpy()]
    moved[list(selected)] = np.arange(len(selected))
    moved[-1] = len(selected) + others + n_targets
    return moved


def _edges(store: RowStore, moved: Any, n_nodes: int) -> tuple[Edges, torch.Tensor, float]:
    """Renumbered rows, what each explains, and how far the worst is from adding up (bias and folds included)."""
    counts, columns, weights, values = [0], [], [], []
    worst = 0.0
    for row in store.in_order():
        number = moved[row.columns]
        kept = number >= 0
        dense = np.bincount(number[kept], row.weights[kept].astype(np.float64), minlength=n_nodes)
        chosen = np.flatnonzero(dense)
        columns.append(chosen.astype(np.int32))
        weights.append(dense[chosen].astype(np.float32))
        counts.append(len(chosen))
        values.append(row.value)
        missing = abs(row.weights.sum(dtype=np.float64) - row.value)
        worst = max(worst, missing / max(np.abs(row.weights).sum(dtype=np.float64), 1e-30))
    if not columns:
        raise GraphError("The graph has no rows.")
    starts = torch.tensor(counts).cumsum(0)
    edges = Edges(starts, torch.from_numpy(np.concatenate(columns)), torch.from_numpy(np.concatenate(weights)))
    return edges, torch.tensor(values, dtype=torch.float32), float(worst)
