"""Phase 5: figures, feature examples, and one self-contained page with everything known about a data set so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from clt.config.base import write_text_atomically
from clt.discovery.examples import Shown, TopExamples, feature_json, write_examples
from clt.discovery.features_file import load_features
from clt.discovery.layout import Layout
from clt.discovery.phases import classified, read_features
from clt.discovery.session import Session
from clt.discovery.table import FeatureTable
from clt.types import FeatureId, Sample
from clt.viz import discovery_plots as plots
from clt.viz import report
from clt.viz.plots import svg
from clt.viz.training_plots import save

HEATMAP_FEATURES = 30
PICTURE = 144
"""Pixels of a picture on the page."""


def visualize(session: Session, *, n_features: int, per_feature: int) -> list[str]:
    """Write the figures, the examples and the page."""
    layout, content = session.layout, read_features(session)
    features = content["features"]
    figures = _figures(session, content)
    for name, figure in figures.items():
        save(figure, layout.figure(name))
    lines = [f"{len(figures)} figures in {layout.figure('top_features').parent}"]
    examples: list[dict[str, Any]] = []
    if n_features:
        examples = feature_examples(session, [_id(row) for row in features[:n_features]], per_feature)
        write_examples(layout.examples, examples)
        write_pictures(session, examples, layout.examples)
        lines.append(f"top examples of {len(examples)} features in {layout.examples}")
    parts = [
        *_opening(layout, content),
        report.figures([(svg(figure), _CAPTIONS[name]) for name, figure in figures.items()]),
        *_steering(layout),
        *_examples(session, examples),
        *_table(features),
    ]
    write_text_atomically(layout.report, _styled(report.page(f"Features of {layout.dataset}", parts)))
    return [*lines, f"page: {layout.report}"]


_CAPTIONS = {
    "top_features": "The first selected features. Dots: the same score on the half of the images that did not choose.",
    "layer_dist": "Selected features per layer: layers take turns.",
    "activation_heatmap": "Strength of the first features in GOOD and BAD samples.",
    "frequency_ratios": "How often selected features are active. On the line they do not tell the classes apart.",
}


def _figures(session: Session, content: Mapping[str, Any]) -> dict[str, Any]:
    features = content["features"]
    shown = features[:HEATMAP_FEATURES]
    samples = classified(session)
    strengths = _strengths(samples.table("counted"), [_id(row) for row in shown])
    names = [f"L{row['layer']} F{row['feature_idx']}" for row in shown]
    return {
        "top_features": plots.top_features(features),
        "layer_dist": plots.layer_distribution(content["layer_distribution"]),
        "activation_heatmap": plots.activation_heatmap(strengths, samples.is_good.tolist(), names),
        "frequency_ratios": plots.frequency_ratios(features),
    }


def _strengths(table: FeatureTable, features: Sequence[FeatureId]) -> np.ndarray:
    """[sample, feature], 0 where not active."""
    columns = np.zeros((table.n_samples, len(features)))
    for place, feature in enumerate(features):
        layer = table.layers[feature.layer]
        start, end = np.searchsorted(layer.features, [feature.feature, feature.feature + 1])
        columns[layer.samples[start:end], place] = layer.strength[start:end]
    return columns


def feature_examples(session: Session, features: Sequence[FeatureId], per_feature: int) -> list[dict[str, Any]]:
    """The strongest samples of each feature over everything that was captured, in the public format."""
    top = TopExamples(features, per_feature)
    for place, response in enumerate(session.responses):
        top.add(place, load_features(session.layout.sample_file(response.number)))
    verdicts = {score.id: session.benchmark.verdict(score) for score in session.report.scores}
    samples = {sample.id: sample for sample in session.samples}

    def shown(place: int) -> Shown:
        response = session.responses[place]
        tokens = session.prompt_pieces(samples[response.id])
        answer = session.pieces(response)[: response.n_positions - response.n_prompt]
        patches = np.flatnonzero(response.mask("image")).tolist()
        judged = {"good": True, "bad": False}.get(verdicts[response.id])
        image = _picture_name(samples[response.id], response.image)
        return Shown(response.id, [*tokens, *answer], patches, image, response.response, judged)

    return [feature_json(feature, top, shown, transcoder_id=session.run.clt) for feature in features]


def write_pictures(session: Session, examples: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Images that were drawn and lie in no file, under the names the examples call them by."""
    samples = {sample.id: sample for sample in session.samples}
    for content in examples:
        for one in content["examples_quantiles"][0]["examples"]:
            picture = next(iter(samples[one["example_id"]].images), None)
            if isinstance(picture, Image.Image) and one["image_references"]:
                picture.save(folder / one["image_references"][0]["image"])


def _picture_name(sample: Sample, key: str) -> str:
    """The file's name; for a drawn image the one `write_pictures` gives it."""
    return f"{key}.png" if sample.images and isinstance(sample.images[0], Image.Image) else key


# --- pieces of the page -------------------------------------------------------------------------------------------


def _opening(layout: Layout, content: Mapping[str, Any]) -> list[str]:
    metrics = json.loads(layout.metrics.read_text())["metrics"] if layout.metrics.is_file() else {}
    numbers = {name.replace("_", " "): f"{value:.4g}" for name, value in list(metrics.items())[:5]}
    return [
        report.paragraph(
            f"{content['total_good_samples']} GOOD and {content['total_bad_samples']} BAD answers of the replacement "
            f"model, {content['total_features_analyzed']:,} active features, {content['selected_features_count']} "
            f"selected by turns; {content.get('n_q_below_0.05', 0):,} of {content.get('n_tested', 0):,} "
            "tested features differ between the classes at q < 0.05."
        ),
        report.cards(numbers),
        report.heading("Selected features"),
    ]


def _steering(layout: Layout) -> list[str]:
    """What steering changed, if it was done."""
    if not layout.steering.is_file():
        return []
    content = json.loads(layout.steering.read_text())
    better: Mapping[str, bool] = content["higher_is_better"]
    rows = content["results"]
    main = [name for name in better if name in rows[0]["changes"]]
    items = [
        (
            svg(plots.steering(rows, name, better[name])),
            f"{name.replace('_', ' ')}: dot and line are the change and its 95 % interval.",
        )
        for name in main
    ]
    for where in dict.fromkeys(row["where"] for row in rows if row["name"] == "chosen" and row["where"] != "neurons"):
        own = [row for row in rows if row["where"] == where and row["name"] == "chosen"]
        items.append((svg(plots.dose_curves(own, main[:3])), f"Chosen features on the {where}, over the dose."))
    return [
        report.heading("Steering"),
        report.paragraph(
            f"{content['n_samples']} answers about {content['n_images']} images that had no part in choosing. Dose d "
            "scales harmful features by 1 - d and helpful ones by 1 + d; learned gains are fitted on the other half. "
            "Controls are random features of the same layer, frequency and strength, with the same factors; beside "
            "learned gains also with gains learned for them."
        ),
        report.table(("", *(name.replace("_", " ") for name in main)), [_steering_row(row, main) for row in rows]),
        report.figures(items),
    ]


def _steering_row(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    cells = [f"{row['where']}, {row['name'].replace('_', ' ')}, dose {row['dose']:g}"]
    for name in metrics:
        change, control = row["changes"][name], row["controls"].get(name)
        # Files of before 2026-11-27 have none.
        learned = row.get("learned_controls", {}).get(name)
        low, high = change["interval"]
        against = f" vs {control['mean']:+.1f}" if control else ""
        against += f" (learned: {learned['mean']:+.1f})" if learned else ""
        cells.append(f"{change['value']:+.1f} [{low:+.1f}, {high:+.1f}]{against}")
    return cells


def _table(features: Sequence[Mapping[str, Any]], n: int = 40) -> list[str]:
    columns = ("feature", "goodness", "freq GOOD", "freq BAD", "avg GOOD", "avg BAD", "q", "effect", "direction")
    rows = (
        [
            f"L{row['layer']} F{row['feature_idx']}",
            f"{row['goodness_score']:.2f}",
            f"{row['good_freq']:.2f}",
            f"{row['bad_freq']:.2f}",
            f"{row['good_avg_activation']:.2f}",
            f"{row['bad_avg_activation']:.2f}",
            f"{row['q_value']:.3f}" if "q_value" in row else "",
            f"{row['effect']:+.3f}" if "effect" in row else "",
            str(row.get("direction", "")),
        ]
        for row in features[:n]
    )
    return [report.heading(f"The first {min(n, len(features))} features in numbers"), report.table(columns, rows)]


def _examples(session: Session, examples: Sequence[Mapping[str, Any]], n: int = 10, each: int = 4) -> list[str]:
    """Pictures with the patches a feature fires on, and the words."""
    if not examples:
        return []
    samples = {sample.id: sample for sample in session.samples}
    parts = [
        report.heading("Where features fire"),
        report.paragraph(
            "Orange is activation relative to the feature's largest: frames on image patches, shading behind words."
        ),
    ]
    for content in examples[:n]:
        shown = content["examples_quantiles"][0]["examples"][:each]
        title = (
            f"L{content['layer']} F{content['feature']}: fires on {content['activation_frequency']:.1%} of positions"
        )
        pieces = (_example(one, samples[one["example_id"]], content["act_max"]) for one in shown)
        parts.append(f'<h3>{escape(title)}</h3><div class="scenes">{"".join(pieces)}</div>')
    return parts


def _example(example: Mapping[str, Any], sample: Sample, largest: float) -> str:
    judged = {True: "GOOD", False: "BAD", None: "neither"}[example["metadata"]["is_good"]]
    words = "".join(
        _word(token, value / largest if largest else 0)
        for token, value in zip(example["tokens"], example["tokens_acts_list"])
        if not token.startswith("<image")
    )
    text = f'<div><span class="label">{judged}</span><p>{words}</p></div>'
    if not sample.images or not example["image_references"]:
        return f'<div class="scene">{text}</div>'
    patches = np.array(example["image_references"][0]["patch_activations"]) / (largest or 1)
    picture = report.data_url(_with_patches(_opened(sample.images[0]), patches))
    return f'<div class="scene"><img alt="image" src="{picture}">{text}</div>'


def _word(token: str, share: float) -> str:
    text = escape(token).replace("\n", "<br>")
    return f'<span style="background:rgba(230,159,0,{share:.2f})">{text}</span>' if share > 0.02 else text


def _opened(image: Image.Image | Path) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.open(image).convert("RGB")


def _with_patches(image: Image.Image, shares: np.ndarray) -> Image.Image:
    """The picture, with a frame around each patch as opaque as the feature is active there.

    Patches form a square grid; where their number is no square the picture is left as it is.
    """
    picture = image.convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
    side = round(len(shares) ** 0.5)
    if side * side != len(shares):
        return picture
    frames = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    pen, size = ImageDraw.Draw(frames), PICTURE / side
    for place, share in enumerate(shares.tolist()):
        if share > 0.02:
            top, left = (place // side) * size, (place % side) * size
            box = (left + 1, top + 1, left + size - 2, top + size - 2)
            pen.rectangle(box, outline=(230, 159, 0, int(80 + 175 * min(share, 1))), width=max(2, int(size / 10)))
    return Image.alpha_composite(picture.convert("RGBA"), frames).convert("RGB")


def _styled(page: str) -> str:
    """Pictures of examples are larger than the report's scenes."""
    css = ".scene img { width: 120px; height: 120px } h3 { margin: 1.6rem 0 .5rem; font-size: 1rem }"
    return page.replace("</style>", f"{css}</style>", 1)


def _id(row: Mapping[str, Any]) -> FeatureId:
    return FeatureId(int(row["layer"]), int(row["feature_idx"]))
