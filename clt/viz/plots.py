"""Figures as matplotlib objects; `svg` turns one into text that a page can hold."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

# One colour per role, the same in every figure; told apart in print and by colour-blind readers (Okabe-Ito).
COLOURS = {"host": "#4d4d4d", "CLT": "#0072b2", "PLT": "#e69f00", "text": "#0072b2", "image": "#009e73"}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "crosslayer",  # the same figure gives the same file
}


def _figure(width: float = 5.2, height: float = 3.1) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element, letters drawn as paths so that it looks the same everywhere."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def training_curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """NMSE on the training batches and (dots) on held-out tokens, over the tokens of the run's steps.

    Args:
        runs: name -> the lines of its `metrics.jsonl`.
    """
    with mpl.rc_context(_STYLE):
        figure = _figure()
        axis = figure.subplots()
        for name, lines in runs.items():
            train = [(line["step"], line["nmse"]) for line in lines if "nmse" in line]
            held_out = [(line["step"], line["held_out/nmse"]) for line in lines if "held_out/nmse" in line]
            axis.plot(*zip(*train, strict=True), color=COLOURS[name], label=f"{name}, training batches", lw=1.2)
            if held_out:
                points = zip(*held_out, strict=True)
                axis.plot(*points, "o", color=COLOURS[name], label=f"{name}, held out", ms=5, mec="white")
        axis.set(xlabel="step", ylabel="NMSE (log scale)", yscale="log")
        axis.legend()
    return figure


def grouped_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    *,
    limit: float | None = None,
    digits: int = 1,
) -> Figure:
    """One group of bars per label, one bar per series, its value written on top."""
    with mpl.rc_context(_STYLE):
        figure = _figure(max(5.2, 0.32 * len(groups) * len(series) + 1.3))
        axis = figure.subplots()
        width = 0.8 / len(series)
        for index, (name, values) in enumerate(series.items()):
            places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
            bars = axis.bar(places, values, width * 0.92, label=name, color=COLOURS.get(name, f"C{index}"))
            axis.bar_label(bars, [f"{value:.{digits}f}" for value in values], fontsize=7, padding=1)
        axis.set_xticks(np.arange(len(groups)), groups)
        axis.set(ylabel=ylabel)
        axis.margins(y=0.15)
        if limit is not None:
            axis.axhline(limit, color="#cc0000", lw=1, ls="--")
        axis.grid(visible=False, axis="x")
        figure.legend(loc="outside upper center", ncols=len(series), fontsize=8)
    return figure


def density_histogram(densities: Mapping[str, np.ndarray]) -> Figure:
    """How often features fire: one outline per name over log10 of the share of tokens.

    Args:
        densities: name -> share of held-out tokens on which each feature fires, any shape; zeros are dead features
            and drawn in the leftmost bin.
    """
    with mpl.rc_context(_STYLE):
        figure = _figure()
        axis = figure.subplots()
        floor = 1e-5
        bins = np.linspace(-5, 0, 41).tolist()
        for name, density in densities.items():
            logs = np.log10(np.clip(density.ravel(), floor, 1))
            axis.hist(logs, bins, histtype="step", lw=1.5, color=COLOURS[name], label=name)
        axis.set(xlabel="log10 of the share of held-out tokens a feature fires on", ylabel="features")
        axis.legend()
    return figure
