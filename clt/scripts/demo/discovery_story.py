"""What the demo tells about features, steering and the graph: a part of `summary.json` and of `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clt.scripts.demo.discovery import GRAPH_PAGE
from clt.viz import discovery_plots, plots, report

METRICS = {
    "hal": "descriptions with an invention",
    "chair": "mentions that are invented",
    "cover": "objects that are mentioned",
    "adversarial_accuracy": "adversarial questions, accuracy",
}
ROWS = {
    "chosen": "harmful features off, helpful doubled",
    "seed_score": "features by the goodness score, doubled",
    "learned": "learned gains",
}
CONTROLS = {
    "controls": "the same on matched random features",
    "learned_controls": "gains learned on matched random features",
}


def discovery_summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of both stages."""
    return {
        stage: {name: value for name, value in results[stage].items() if name != "story"}
        for stage in ("discovery", "graph")
    }


def discovery_section(summary: Mapping[str, Any]) -> list[str]:
    """The hallucination metric moves when features are steered, and what random features do."""
    found = summary["discovery"]
    before = found["before"]["host"]
    rows = [["before", *(f"{before[name]:.1f} %" for name in METRICS)]]
    for row in found["results"]:
        rows.append([ROWS[row["name"]], *(_change(row["changes"][name]) for name in METRICS)])
        for kind, words in CONTROLS.items():
            if row.get(kind):
                rows.append([words, *(_control(row[kind][name]) for name in METRICS)])
    better = found["higher_is_better"]
    figures = [
        (plots.svg(discovery_plots.steering(found["results"], name, better[name])), f"Change of: {words}, in points.")
        for name, words in METRICS.items()
        if name in ("hal", "adversarial_accuracy")
    ]
    return [
        report.heading("The features behind the inventions"),
        report.paragraph(
            "On one half of new scenes every feature's push towards inventions was measured (gradient x activation); "
            f"{found['n_q_below_0.05']:,} of {found['n_tested']:,} tested features "
            "fire differently in good and bad answers (permutation test, q < 0.05). Then features were turned up or "
            f"down in the host while it answered about the {found['n_images']} scenes of the other half: "
            f"{found['n_samples']:,} answers. In brackets: 95 % paired bootstrap interval over scenes. Below each: "
            "the same factors on random features of the same layer, frequency and strength, and gains learned for such "
            "features, as mean and standard deviation of the draws."
        ),
        report.table(("", *METRICS.values()), rows),
        report.figures(figures),
        report.links({"All features, statistics and examples": f"discovery/{found['page']}"}),
    ]


def graph_section(summary: Mapping[str, Any]) -> list[str]:
    """Where the graph of one invention is and what it explains."""
    graph = summary["graph"]
    return [
        report.heading("One invention, traced"),
        report.paragraph(
            f"The model says \u201c{graph['answer']}\u201d, but there is no {graph['invented']}. The graph shows which "
            f"features and which of the image's {graph['n_patches']} patches led to "
            f"\u201c{graph['target'].strip()}\u201d (probability {graph['probability']:.2f}): {graph['n_kept']:,} of "
            f"{graph['n_nodes']:,} nodes are shown first."
        ),
        report.links({"Open the attribution graph": f"graph/{GRAPH_PAGE}"}),
    ]


def _change(change: Mapping[str, Any]) -> str:
    low, high = change["interval"]
    return f"{change['value']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _control(control: Mapping[str, Any]) -> str:
    spread = "" if control["std"] is None else f" ± {control['std']:.1f}"
    return f"{control['mean']:+.1f}{spread} ({len(control['draws'])})"
