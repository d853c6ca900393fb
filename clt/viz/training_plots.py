"""Figures of an evaluation and of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from clt.viz.plots import _STYLE, _figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        figure.savefig(path, dpi=150)


def per_layer(values: Sequence[float], ylabel: str, kinds: Mapping[str, Sequence[float]] | None = None) -> Figure:
    """One bar per layer, and a mark per token kind where those are given."""
    with mpl.rc_context(_STYLE):
        figure = _figure()
        axis = figure.subplots()
        layers = np.arange(len(values))
        axis.bar(layers, values, color="#0072b2", alpha=0.8, label="all tokens")
        for index, (name, numbers) in enumerate((kinds or {}).items()):
            axis.plot(layers, numbers, "o", color=f"C{index + 1}", label=f"{name} tokens", mec="white")
        axis.set(xlabel="layer", ylabel=ylabel, xticks=layers)
        if kinds:
            axis.legend()
    return figure


def density_per_layer(density: np.ndarray) -> Figure:
    """How often features fire: one outline per layer over log10 of the share of tokens; never is leftmost.

    Args:
        density: [layer, feature].
    """
    with mpl.rc_context(_STYLE):
        figure = _figure()
        axis = figure.subplots()
        colours = [mpl.colormaps["viridis"](x) for x in np.linspace(0, 0.9, len(density))]
        for layer, (row, colour) in enumerate(zip(density, colours, strict=True)):
            logs = np.log10(np.clip(row, 1e-5, 1))
            axis.hist(
                logs, np.linspace(-5, 0, 41).tolist(), histtype="step", lw=1.2, color=colour, label=f"layer {layer}"
            )
        axis.set(xlabel="log10 of the share of held-out tokens a feature fires on", ylabel="features")
        if len(density) <= 12:
            axis.legend(fontsize=7)
    return figure


def error_by_distance(nmse: Mapping[str, Sequence[float]]) -> Figure:
    """NMSE when only sources up to a distance are used: a line per layer, their mean in bold.

    Args:
        nmse: largest distance used -> NMSE per layer.
    """
    with mpl.rc_context(_STYLE):
        figure = _figure()
        axis = figure.subplots()
        table = np.asarray(list(nmse.values()))
        colours = [mpl.colormaps["viridis"](x) for x in np.linspace(0, 0.9, table.shape[1])]
        for layer, colour in enumerate(colours):
            axis.plot(table[:, layer], color=colour, lw=1, alpha=0.7, label=f"layer {layer}")
        axis.plot(table.mean(1), color="black", lw=2, marker="o", label="mean")
        axis.set_xticks(range(len(nmse)), list(nmse))
        axis.set(xlabel="farthest source used (layers before the target)", ylabel="NMSE", ylim=(0, None))
        if table.shape[1] <= 12:
            axis.legend(fontsize=7)
    return figure


def frontier(points: Mapping[str, Sequence[tuple[str, float, float]]]) -> Figure:
    """Explained variance over L0 per layer: one line per family, each point with its name.

    Args:
        points: family -> (name, L0 per layer, explained variance).
    """
    with mpl.rc_context(_STYLE):
        figure = _figure(6.0, 4.0)
        axis = figure.subplots()
        for index, (family, rows) in enumerate(points.items()):
            ordered = sorted(rows, key=lambda row: row[1])
            axis.plot([row[1] for row in ordered], [row[2] for row in ordered], "o-", color=f"C{index}", label=family)
            for name, l0, explained in ordered:
                axis.annotate(name, (l0, explained), fontsize=6, xytext=(3, -8), textcoords="offset points")
        axis.set(xlabel="active features per token and layer (L0)", ylabel="explained variance, held out")
        axis.legend()
    return figure
