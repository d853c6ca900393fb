"""How faithful are attribution graphs? Worlds with known circuits, and predicted effects against real ones.

clt faithfulness                  # two-hop and Boolean worlds, CLT and PLT side by side, about two minutes on two cores
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clt import worlds
from clt.attribution.faithfulness.boolean import measure_boolean
from clt.attribution.faithfulness.effects import MEASURES, measure_effects
from clt.attribution.faithfulness.middle_hop import measure_middle_hop
from clt.attribution.faithfulness.models import WINDOWS, world_model
from clt.config.base import Config, require_positive, write_text_atomically
from clt.viz.report import heading, page, paragraph, table


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """How much to measure, and where to write it."""

    output_dir: Path = Path("runs/faithfulness")
    """Folder for faithfulness.json, faithfulness.html and the transcoders."""
    questions: int = 57
    """Held-out two-hop questions; there are 57."""
    effect_prompts: int = 20
    """Prompts on which predicted effects are held against real ones."""
    per_prompt: int = 24
    """Random active features switched off on each."""
    steps: int = 600
    """Training steps of each transcoder."""
    json: bool = False
    """Print the result as JSON instead of tables."""

    def __post_init__(self) -> None:
        require_positive(
            "faithfulness",
            **{name: getattr(self, name) for name in ("questions", "effect_prompts", "per_prompt", "steps")},
        )


def main(options: Options) -> None:
    """Train, measure, write, print."""
    held_out = worlds.load("two-hop").questions("held_out", options.questions)
    result: dict[str, Any] = {"options": options.to_dict(), "two_hop": {}, "effects": {}}
    for kind in WINDOWS:
        model = world_model("two-hop", kind, steps=options.steps, folder=options.output_dir / "transcoders")
        result["two_hop"][kind] = measure_middle_hop(model, held_out)
        prompts = held_out[: options.effect_prompts]
        result["effects"][kind] = measure_effects(model, prompts, per_prompt=options.per_prompt)
    result["boolean"] = measure_boolean(options.steps)
    text = json.dumps(result, indent=2, default=str)
    write_text_atomically(options.output_dir / "faithfulness.json", text + "\n")
    write_text_atomically(options.output_dir / "faithfulness.html", html(result))
    print(text if options.json else "\n\n".join(plain(*each) for each in sections(result)))
    if not options.json:
        print(f"\n{options.output_dir / 'faithfulness.json'}\n{options.output_dir / 'faithfulness.html'}")


def sections(result: dict[str, Any]) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Title, explanation, columns and rows of each table."""
    kinds = list(result["two_hop"])
    hop, effects, boolean = result["two_hop"], result["effects"], result["boolean"]
    rows = [(measure, row["distance"]) for measure in MEASURES for row in effects[kinds[0]]["by_distance"][measure]]
    return [
        (
            "Two-hop world: the middle hop",
            "Do pruned graphs of held-out questions hold a feature for the city's state? What does changing it do?",
            ["", *kinds],
            [[name, *(shown(hop[kind][name]) for kind in kinds)] for name in hop[kinds[0]]],
        ),
        (
            "Boolean worlds: gates and short cuts",
            "Circuits of two levels built by hand; `neurons` are the MLPs themselves as a transcoder.",
            ["", *boolean],
            [[name, *(shown(boolean[kind][name]) for kind in boolean)] for name in boolean["neurons"]],
        ),
        (
            "Perturbation: predicted against real change in later layers",
            "Features switched off in the host; nmse is a median. read: of what the layer reads; "
            "reaction: of what its MLP writes, the feature's own writing left out; held: that with attention held.",
            ["of", "layers later", *(f"{kind} {name}" for kind in kinds for name in ("cosine", "nmse"))],
            [
                [name, str(distance), *(_at(effects[kind], name, distance, key) for kind in kinds for key in _KEYS)]
                for name, distance in rows
            ],
        ),
        (
            "Ablation against influence",
            "Rank correlation between a feature's influence in the graph and how far the target moves without it.",
            ["", *kinds],
            [["Spearman", *(shown(effects[kind]["ablation_spearman"]) for kind in kinds)]],
        ),
    ]


_KEYS = ("cosine", "nmse_median")


def _at(effects: dict[str, Any], measure: str, distance: int, key: str) -> str:
    return next((shown(row[key]) for row in effects["by_distance"][measure] if row["distance"] == distance), "")


def shown(value: Any) -> str:
    """A number as a table shows it."""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
    return "" if value is None else str(value)


def plain(title: str, text: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table for the terminal."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [columns, *rows]]
    return "\n".join([title, text, *lines])


def html(result: dict[str, Any]) -> str:
    """The report as one file."""
    parts = [
        part
        for title, text, columns, rows in sections(result)
        for part in (heading(title), paragraph(text), table(columns, rows))
    ]
    return page("Faithfulness of attribution graphs", parts)
