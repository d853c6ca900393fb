"""From the stages' results to `summary.json` and `report.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from clt.config.base import write_text_atomically
from clt.scripts.demo import Options
from clt.scripts.demo.discovery_story import discovery_section, discovery_summary, graph_section
from clt.training.run_folder import versions
from clt.viz import plots, report
from clt.worlds.shapes.score import mentioned

NAMES = {"clt": "CLT", "plt": "PLT"}
CATEGORIES = ("random", "popular", "adversarial")


def summarise(results: Mapping[str, Any], seconds: Mapping[str, float], options: Options) -> dict[str, Any]:
    """The numbers of the demo, for programs."""
    host, clt = results["host"], results["clt-replacement"]
    return {
        "date": date.today().isoformat(),
        "options": options.to_dict(),
        "versions": versions(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "host": {"parameters": host["parameters"], **_scores(host)},
        **{name: _transcoder(results[name], results[f"{name}-replacement"]["fidelity"]) for name in NAMES},
        "replacement": {**_scores(clt), "plt": _scores(results["plt-replacement"])},
        **discovery_summary(results),
    }


def _scores(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"pope": result["pope"], "amber_like": result["amber_like"]}


def _transcoder(result: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
    keys = (
        "nmse", "nmse_per_layer", "explained_variance", "nmse_per_kind", "l0", "l0_per_layer", "dead_share",
        "dead_per_layer", "features_per_layer", "n_tokens", "parameters", "train_seconds",
    )  # fmt: skip
    measures = ("token_match", "kl", "top1")
    return {
        **{key: result[key] for key in keys},
        **{name: fidelity[name]["value"] for name in measures},
        "intervals": {name: fidelity[name]["interval"] for name in measures},
        "fidelity": dict(fidelity),
    }


# --- the page -------------------------------------------------------------------------------------------------


def write_report(folder: Path, world: Any, results: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """One self-contained page with the story, the figures and the numbers."""
    parts = [
        *_opening(summary),
        *_hallucination(world, results, summary),
        *_transcoders(results, summary),
        *_replacement(summary),
        *discovery_section(summary),
        *graph_section(summary),
        *_reproduce(summary),
    ]
    write_text_atomically(folder / "report.html", report.page("A transcoder in place of every MLP", parts))


def _opening(summary: Mapping[str, Any]) -> list[str]:
    clt, host = summary["clt"], summary["host"]
    return [
        report.paragraph(
            f"A tiny vision-language model ({host['parameters'] / 1e6:.2f} M parameters, a real LLaVA) describes drawn "
            "scenes and invents objects that usually go together. A cross-layer transcoder (CLT) was trained on what "
            "its MLPs read and write, then put in their place. All numbers are from held-out scenes."
        ),
        report.cards(
            {
                "variance explained (mean over layers)": f"{clt['explained_variance']:.1%}",
                "active features per token and layer": f"{clt['l0']:.1f} of {clt['features_per_layer']}",
                "generated tokens equal to the host's": f"{clt['token_match']:.1%}",
                "features that never fired": f"{clt['dead_share']:.2%}",
                "training": f"{clt['train_seconds']:.0f} s",
                "described objects that are not there": f"{host['amber_like']['chair']:.1f} %",
            }
        ),
    ]


def _hallucination(world: Any, results: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    pope, amber = summary["host"]["pope"], summary["host"]["amber_like"]
    categories = ", ".join(f"{name} {pope['categories'][name]['accuracy']:.1f} %" for name in CATEGORIES)
    return [
        report.heading("The host hallucinates"),
        report.paragraph(
            f"Yes/no questions ({pope['n']}, in the way of POPE): {pope['accuracy']:.1f} % right; by kind of negative: "
            f"{categories}. Adversarial negatives ask for the usual companion of something in the picture. "
            f"Descriptions ({amber['n']}, in the way of AMBER): CHAIR {amber['chair']:.1f}, "
            f"Cover {amber['cover']:.1f}, Hal {amber['hal']:.1f}, Cog {amber['cog']:.1f}. "
            "Words for objects that are not there are marked."
        ),
        report.scenes(_scene_pieces(world, results)),
    ]


def _scene_pieces(world: Any, results: Mapping[str, Any], count: int = 6) -> list[str]:
    """The first held-out scenes, half of them with an invented object."""
    host, clt = results["host"]["descriptions"], results["clt-replacement"]["descriptions"]
    samples = world.descriptions("held_out", len(host))
    wrong = [set(mentioned(text)) - set(s.meta["truth"]) for s, text in zip(samples, host, strict=True)]
    invented = [index for index, words in enumerate(wrong) if words][: count // 2]
    faithful = [index for index, words in enumerate(wrong) if not words][: count - len(invented)]
    pieces = []
    for index in sorted(invented + faithful):
        sample = samples[index]
        texts = {"there": ", ".join(sample.meta["truth"]), "host": host[index], "with the CLT": clt[index]}
        absent = (set(mentioned(host[index])) | set(mentioned(clt[index]))) - set(sample.meta["truth"])
        pieces.append(report.scene(sample.images[0], texts, absent))
    return pieces


def _transcoders(results: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    layers = range(len(summary["clt"]["nmse_per_layer"]))
    labels = [f"layer {layer}" for layer in layers]
    by_layer = {label: summary[name]["nmse_per_layer"] for name, label in NAMES.items()}
    by_kind = {kind: values for kind, values in summary["clt"]["nmse_per_kind"].items() if kind in ("text", "image")}
    items = [
        (plots.training_curves({label: results[name]["metrics"] for name, label in NAMES.items()}),
         "Error during training; the learning rate falls over the last fifth."),
        (plots.grouped_bars(labels, by_layer, "NMSE, held out", digits=3),
         "Share of each MLP output's variance that is not explained, on held-out tokens (lower is better)."),
        (plots.grouped_bars(labels, by_kind, "NMSE, held out", digits=3),
         "The CLT's error on text and on image tokens."),
        (plots.density_histogram({label: np.array(results[name]["density"]) for name, label in NAMES.items()}),
         "How often features fire. Dead ones would stand at the left edge."),
    ]  # fmt: skip
    clt = summary["clt"]
    return [
        report.heading("The transcoders"),
        report.paragraph(
            "Each feature reads the input of one MLP. A CLT feature writes to the output of that MLP and of all "
            "later ones; the per-layer transcoder (PLT) beside it, trained on the same tokens in the same order, "
            f"writes only to its own. {clt['features_per_layer']} features per layer, {clt['l0']:.1f} active per token "
            f"and layer; {clt['n_tokens']:,} held-out tokens."
        ),
        report.figures([(plots.svg(figure), caption) for figure, caption in items]),
    ]


def _replacement(summary: Mapping[str, Any]) -> list[str]:
    pairs: list[tuple[str, Mapping[str, Any]]] = [
        ("host", summary["host"]),
        ("CLT", summary["replacement"]),
        ("PLT", summary["replacement"]["plt"]),
    ]
    accuracy = {name: [s["pope"]["categories"][c]["accuracy"] for c in CATEGORIES] for name, s in pairs}
    measures = ("chair", "cover", "hal", "cog")
    amber = {name: [s["amber_like"][m] for m in measures] for name, s in pairs}
    rows = [_fidelity_row(label, key, summary) for label, key in _FIDELITY_ROWS]
    return [
        report.heading("The transcoder in place of the MLPs"),
        report.paragraph(
            "Every MLP of the language model is removed; what it would have written is computed from the features of "
            "all layers so far. In brackets: 95 % bootstrap interval over samples, and the number of positions."
        ),
        report.table(("", *NAMES.values()), rows),
        report.figures(
            [
                (plots.svg(plots.grouped_bars(CATEGORIES, accuracy, "accuracy, %")), "Yes/no questions, by negatives."),
                (
                    plots.svg(plots.grouped_bars([m.capitalize() for m in measures], amber, "%")),
                    "Descriptions: CHAIR, Hal and Cog lower is better, Cover higher.",
                ),
            ]
        ),
    ]


_FIDELITY_ROWS = (
    ("generated tokens equal to the host's", "token_match"),
    ("same most likely token, teacher-forced", "top1"),
    ("KL(host || replacement), nats per token", "kl"),
)


def _fidelity_row(label: str, key: str, summary: Mapping[str, Any]) -> list[str]:
    cells = [label]
    for name in NAMES:
        measure = summary[name]["fidelity"][key]
        low, high = measure["interval"]
        percent = key != "kl"
        value, low, high = (f"{x:.1%}" if percent else f"{x:.4f}" for x in (measure["value"], low, high))
        cells.append(f"{value} [{low}, {high}; {measure['n']:,}]")
    return cells


def _reproduce(summary: Mapping[str, Any]) -> list[str]:
    flags = " --quick" if summary["options"]["quick"] else ""
    made = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    times: Sequence[tuple[str, str]] = [(name, f"{value:.0f} s") for name, value in summary["seconds"].items()]
    return [
        report.heading("Again, and on your model"),
        report.code(
            f"clt demo{flags}\n\n"
            "clt generate --model llava-hf/llava-1.5-7b-hf --dataset pairs.jsonl --activation-dir activations\n"
            "clt train --data activations/... --output-dir runs/llava --num-features 32768\n"
            "clt evaluate --clt runs/llava --data activations/...\n"
            "clt fidelity --model llava-hf/llava-1.5-7b-hf --clt runs/llava --dataset held_out.jsonl"
        ),
        report.table(("stage", "time"), times),
        report.paragraph(f"{summary['date']}; {made}.", soft=True),
    ]
