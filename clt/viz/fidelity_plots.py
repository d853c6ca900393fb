"""Fidelity of replacement models: by number of layers replaced, and side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clt.viz.plots import _STYLE, COLOURS, _figure

_PANELS = (
    ("kl", "KL to the host, nats"),
    ("top1", "top-1 agreement"),
    ("token_match", "free-running token match"),
)
# Drawn in this order where a name is not one of the roles that have a colour of their own.
_OTHERS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")

Report = Mapping[str, Any]
"""`FidelityReport.to_dict()`."""


def fidelity_by_layers(reports: Mapping[str, Mapping[int, Report]]) -> Figure:
    """Three measures over the number of layers replaced, a line per transcoder with its 95 % intervals.

    Args:
        reports: name -> number of layers -> report.
    """
    with mpl.rc_context(_STYLE):
        figure = _figure(9.0, 3.1)
        for axis, (measure, label) in zip(figure.subplots(1, 3), _PANELS):
            for index, (name, by_count) in enumerate(reports.items()):
                counts = sorted(by_count)
                # Side by side, so that equal values do not hide each other.
                places = np.array(counts) + 0.1 * (index - (len(reports) - 1) / 2)
                values, low, high = _values([by_count[count][measure] for count in counts])
                options = {"label": name, "color": _colour(name, index), "capsize": 3, "marker": "o", "ms": 4}
                axis.errorbar(places, values, [values - low, high - values], **options)
            axis.set(xlabel="MLPs replaced, from the first", ylabel=label)
            axis.set_ylim(*((0, None) if measure == "kl" else (None, 1.005)))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=8)
    return figure


def fidelity_side_by_side(reports: Mapping[str, Report]) -> Figure:
    """Three measures with their 95 % intervals, a point per replacement."""
    with mpl.rc_context(_STYLE):
        figure = _figure(9.0, 2.8)
        for axis, (measure, label) in zip(figure.subplots(1, 3), _PANELS):
            for index, (name, report) in enumerate(reports.items()):
                values, low, high = _values([report[measure]])
                options = {"color": _colour(name, index), "capsize": 4, "marker": "o"}
                axis.errorbar([index], values, [values - low, high - values], **options)
            axis.set(xticks=range(len(reports)), xticklabels=list(reports), xlim=(-0.5, len(reports) - 0.5))
            axis.set(ylabel=label, ylim=(0, None if measure == "kl" else 1.02))
            axis.grid(visible=False, axis="x")
    return figure


def _values(measures: list[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    value = np.array([measure["value"] for measure in measures])
    low, high = np.array([measure["interval"] for measure in measures]).T
    # A bootstrap interval need not hold the value itself when nearly all resamples agree.
    return value, np.minimum(low, value), np.maximum(high, value)


def _colour(name: str, index: int) -> str:
    return COLOURS.get(name, _OTHERS[index % len(_OTHERS)])
