"""Figures of feature discovery: the phase guide's four, and steering against its controls.

Two sides are blue and orange (Okabe-Ito) throughout: GOOD and BAD, helpful and harmful; never red and green.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clt.viz.plots import _STYLE, _figure

GOOD, BAD, CONTROL = "#0072b2", "#d55e00", "#7f7f7f"
SHOWN = 20


def top_features(features: Sequence[Mapping[str, Any]]) -> Figure:
    """The first features by the score that chose them, best on top."""
    rows = list(features[:SHOWN])[::-1]
    names = [f"L{row['layer']} F{row['feature_idx']}" for row in rows]
    with mpl.rc_context(_STYLE):
        figure = _figure(6.4, 0.26 * len(rows) + 1.2)
        axis = figure.subplots()
        axis.barh(names, [row["goodness_score"] for row in rows], color=GOOD)
        held_out = [row.get("held_out", {}).get("goodness_score") for row in rows]
        if all(value is not None for value in held_out):
            axis.plot(held_out, names, "o", color=BAD, mec="white", label="same feature, other half of the images")
            axis.legend(loc="lower right", fontsize=8)
        axis.set(xlabel="goodness score = frequency ratio x mean GOOD activation")
        axis.grid(visible=False, axis="y")
    return figure


def layer_distribution(counts: Mapping[str, int]) -> Figure:
    """How many features each layer gave."""
    with mpl.rc_context(_STYLE):
        figure = _figure(max(5.2, 0.22 * len(counts) + 1))
        axis = figure.subplots()
        axis.bar([int(layer) for layer in counts], list(counts.values()), color=GOOD)
        axis.set(xlabel="layer", ylabel="selected features", xticks=[int(layer) for layer in counts])
        axis.grid(visible=False, axis="x")
    return figure


def frequency_ratios(features: Sequence[Mapping[str, Any]]) -> Figure:
    """How often each selected feature is active in BAD and in GOOD samples; on the line it does not tell them apart."""
    with mpl.rc_context(_STYLE):
        figure = _figure(4.6, 4.2)
        axis = figure.subplots()
        good = np.array([row["good_freq"] for row in features])
        bad = np.array([row["bad_freq"] for row in features])
        strength = np.array([row["good_avg_activation"] for row in features])
        points = axis.scatter(bad, good, c=strength, cmap="cividis", s=18, edgecolors="white", linewidths=0.4)
        axis.plot([0, 1], [0, 1], color=CONTROL, lw=1, ls="--")
        figure.colorbar(points, label="mean activation in GOOD")
        axis.set(xlabel="share of BAD samples where active", ylabel="share of GOOD samples where active")
    return figure


def activation_heatmap(
    strengths: Float[np.ndarray, "sample feature"], is_good: Sequence[bool], names: Sequence[str]
) -> Figure:
    """Samples by features: each feature's strength relative to its largest, GOOD samples above the line.

    Args:
        strengths: 0 where a feature is not active in a sample.
    """
    order = np.argsort(~np.asarray(is_good), kind="stable")
    values = strengths[order] / np.maximum(strengths.max(0, keepdims=True), 1e-12)
    with mpl.rc_context(_STYLE):
        figure = _figure(max(6.0, 0.24 * len(names) + 1.6), 4.2)
        axis = figure.subplots()
        image = axis.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        border = int(np.sum(is_good))
        axis.axhline(border - 0.5, color="white", lw=1.5)
        axis.set_yticks([border / 2, (border + len(values)) / 2], ["GOOD", "BAD"])
        axis.set_xticks(range(len(names)), list(names), rotation=90, fontsize=7)
        axis.grid(visible=False)
        figure.colorbar(image, label="strength, relative to the feature's largest")
    return figure


def steering(rows: Sequence[Mapping[str, Any]], metric: str, higher_is_better: bool) -> Figure:
    """The change of one metric by every way of steering, with its interval, beside the draws of its controls."""
    labels = [f"{row['where']}: {row['name'].replace('_', ' ')}, dose {row['dose']:g}" for row in rows]
    with mpl.rc_context(_STYLE):
        figure = _figure(6.4, 0.36 * len(rows) + 1.3)
        axis = figure.subplots()
        for place, row in enumerate(reversed(rows)):
            _steered(axis, place, row, metric)
        axis.axvline(0, color="black", lw=1)
        axis.set_yticks(range(len(rows)), labels[::-1], fontsize=8)
        side = "right" if higher_is_better else "left"
        grey = "grey: matched random features, same factors; x: gains learned for them"
        axis.set(xlabel=f"change of {metric.replace('_', ' ')} (better: {side})\n{grey}")
        axis.grid(visible=False, axis="y")
    return figure


def _steered(axis: Axes, place: int, row: Mapping[str, Any], metric: str) -> None:
    change = row["changes"][metric]
    low, high = change["interval"]
    for kind, marker, size in (("controls", "|", 12), ("learned_controls", "x", 6)):
        draws = row.get(kind, {}).get(metric, {}).get("draws", [])
        axis.plot(draws, [place] * len(draws), marker, color=CONTROL, ms=size, mew=1.5)
    axis.plot([low, high], [place, place], color=GOOD, lw=2)
    axis.plot(change["value"], place, "o", color=GOOD, mec="white", ms=7)


def dose_curves(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Figure:
    """Each metric's change over the dose, chosen features against the mean of their controls."""
    doses = sorted({row["dose"] for row in rows})
    by_dose = {row["dose"]: row for row in rows}
    with mpl.rc_context(_STYLE):
        figure = _figure(3.0 * len(metrics) + 0.4, 2.8)
        axes = np.atleast_1d(figure.subplots(1, len(metrics)))
        for axis, metric in zip(axes, metrics):
            changes = [by_dose[dose]["changes"][metric] for dose in doses]
            own = [0.0, *(change["value"] for change in changes)]
            low, high = ([0.0, *(change["interval"][side] for change in changes)] for side in (0, 1))
            control = [0.0, *(by_dose[dose]["controls"].get(metric, {"mean": np.nan})["mean"] for dose in doses)]
            axis.fill_between([0, *doses], low, high, color=GOOD, alpha=0.2, lw=0)
            axis.plot([0, *doses], own, "o-", color=GOOD, label="chosen")
            axis.plot([0, *doses], control, "s--", color=CONTROL, label="matched random")
            axis.set(xlabel="dose", title=metric.replace("_", " "))
        axes[0].set_ylabel("change, points")
        axes[0].legend(fontsize=8)
    return figure
