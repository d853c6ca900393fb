"""Attribution graphs with random but plausible numbers, in the file formats a page opens; no model, no torch."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

_SENTENCE = "the old town of Austin lies in Texas , far from the sea ; its capital hall was built in 1888 by masons"
TEXT = ["<bos>", "Fact", ":", "The", "capital", "of", "the", "state", "containing", "Dallas", "is"]


def write_graph_folder(
    folder: Path,
    *,
    n_features: int = 200,
    n_layers: int = 6,
    tokens: list[str] | None = None,
    n_targets: int = 4,
    inputs_per_row: int = 60,
    dictionary: int = 16_384,
    grid: tuple[int, int] | None = None,
    alike: tuple[int, ...] = (),
    seed: int = 0,
) -> Path:
    """Our own format (docs/attribution.md), complete.

    Args:
        inputs_per_row: edges into each feature and target, at most.
        dictionary: features per layer of the transcoder.
        grid: rows and columns of image patches put behind the first token.
        alike: positions of patches that are one node, the first of them.
    """
    rng = np.random.default_rng(seed)
    positions = _positions(tokens or TEXT, grid)
    n_positions = len(positions)
    layer = np.sort(rng.integers(0, n_layers, n_features))
    features = np.stack([layer, _places(rng, n_features, n_positions), rng.integers(0, dictionary, n_features)], 1)
    for position in alike:
        positions[position]["group"] = alike[0]
    features = np.unique(features, axis=0)
    n_features = len(features)
    edges = _edges(rng, features, n_layers, n_positions, n_targets, inputs_per_row, alike[1:])
    probabilities = np.array([0.55 * 0.5**k for k in range(n_targets)])
    influence = _influence(edges, n_features, n_layers, n_positions, probabilities)
    order = np.argsort(-influence, kind="stable")
    cumulative = np.zeros(len(influence))
    cumulative[order] = influence[order].cumsum() / influence.sum()
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {
        "features": features.astype(np.int64),
        "activations": rng.gamma(2.0, 1.5, n_features).astype(np.float32),
        **edges,
        "row_value": rng.normal(0, 1, n_features + n_targets).astype(np.float32),
        "influence": influence.astype(np.float32),
        "cumulative": cumulative.astype(np.float32),
        "active_features": features.astype(np.int64),
        "active_values": np.ones(n_features, dtype=np.float32),
    }
    save_file(tensors, folder / "graph.safetensors")
    images = [_save_image(folder)] if grid else []
    about = {
        "format": "crosslayer-graph",
        "format_version": 1,
        "slug": folder.name,
        "prompt": " ".join(place["text"] for place in positions if place["kind"] != "image"),
        "model": "synthetic",
        "transcoder": "synthetic-clt",
        "scan": "synthetic-clt",
        "n_layers": n_layers,
        "n_features": dictionary,
        "positions": positions,
        "images": images,
        "targets": [
            {"text": text, "token_id": 300 + k, "probability": float(p), "position": n_positions - 1}
            for k, (text, p) in enumerate(zip([" Austin", " Texas", " the", " a"] * 4, probabilities))
        ],
        "vocabulary": 50_000,
        "options": {},
        "checks": {"scores": {"replacement": 0.71, "completeness": 0.86}},
        "labels": {f"{features[0][0]}/{features[0][2]}": "capital cities"},
        "versions": {},
    }
    (folder / "graph.json").write_text(json.dumps(about))
    return folder


def _positions(tokens: list[str], grid: tuple[int, int] | None) -> list[dict[str, Any]]:
    places = [{"token_id": 10 + n, "text": f" {text}", "kind": "text", "patch": None} for n, text in enumerate(tokens)]
    if grid is None:
        return places
    rows, columns = grid
    width, height = 96 / columns, 96 / rows
    patches: list[dict[str, Any]] = []
    for row in range(rows):
        for column in range(columns):
            left, top = column * width, row * height
            box = [left, top, left + width, top + height]
            patch = {"image": 0, "row": row, "column": column, "box": box, "crop": "whole"}
            patches.append({"token_id": 5, "text": "<image>", "kind": "image", "patch": patch})
    return [places[0], *patches, *places[1:]]


def _save_image(folder: Path) -> dict[str, Any]:
    image = Image.new("RGB", (96, 96), (214, 222, 230))
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 10, 40, 42), fill=(202, 60, 50))
    draw.rectangle((56, 52, 88, 86), fill=(40, 110, 180))
    draw.polygon([(20, 88), (36, 58), (52, 88)], fill=(230, 180, 40))
    image.save(folder / "image_0.png")
    return {"file": "image_0.png", "width": 96, "height": 96}


def _places(rng: np.random.Generator, n: int, n_positions: int) -> np.ndarray:
    """Later positions hold more of what matters."""
    return np.minimum(n_positions - 1, (n_positions * rng.beta(2.2, 1.2, n)).astype(int))


def _edges(
    rng: np.random.Generator,
    features: np.ndarray,
    n_layers: int,
    n_positions: int,
    n_targets: int,
    most: int,
    empty: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """Rows of features, then of targets: sources of lower layers and no later positions, heavy-tailed weights.

    Args:
        empty: positions whose embedding and error nodes have no effect.
    """
    n_features = len(features)
    first_embedding = n_features + n_layers * n_positions
    layers = np.concatenate([features[:, 0], np.repeat(np.arange(n_layers), n_positions)])
    starts, sources, weights = [0], [], []
    for row in range(n_features + n_targets):
        layer = features[row, 0] if row < n_features else n_layers
        below = int(np.searchsorted(features[:, 0], layer))
        n_errors = int(layer) * n_positions
        pool = np.concatenate([np.arange(below), n_features + np.arange(n_errors)])
        chosen = rng.choice(pool, min(most, len(pool)), replace=False) if len(pool) else pool
        embeddings = first_embedding + rng.choice(n_positions, min(n_positions, 40), replace=False)
        source = np.unique(np.concatenate([chosen, embeddings])).astype(np.int32)
        source = source[(source < n_features) | ~np.isin((source - n_features) % n_positions, empty)]
        size = rng.pareto(1.4, len(source)) * np.where(rng.random(len(source)) < 0.3, -0.4, 1.0)
        sources.append(source)
        weights.append(size * np.where(source < n_features, 1.0, 0.35))
        starts.append(starts[-1] + len(source))
    assert len(layers)
    return {
        "row_start": np.array(starts, dtype=np.int64),
        "source": np.concatenate(sources).astype(np.int32),
        "weight": np.concatenate(weights).astype(np.float32),
    }


def _influence(
    edges: dict[str, np.ndarray], n_features: int, n_layers: int, n_positions: int, probabilities: np.ndarray
) -> np.ndarray:
    first_target = n_features + (n_layers + 1) * n_positions
    n_nodes = first_target + len(probabilities) + 1
    rows = np.concatenate([np.arange(n_features), first_target + np.arange(len(probabilities))])
    target = np.repeat(rows, np.diff(edges["row_start"]))
    size = np.abs(edges["weight"].astype(np.float64))
    share = size / np.bincount(target, size, n_nodes)[target]
    through, total = np.zeros(n_nodes), np.zeros(n_nodes)
    through[first_target:-1] = probabilities
    for _ in range(n_layers + 2):
        through = np.bincount(edges["source"], share * through[target], n_nodes)
        total += through
    return total


def write_examples(folder: Path, features: list[tuple[int, int]]) -> Path:
    """Feature examples, one JSON file per feature."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "the",
        "old",
        "town",
        "of",
        "Austin",
        "lies",
        "in",
        "Texas",
        ",",
        "far",
        "from",
        "the",
        "sea",
        ";",
        "its",
        "capital",
        "hall",
        "was",
        "built",
        "in",
        "1888",
        "by",
        "masons",
    ]
    for layer, feature in features:
        quantiles = []
        for name, top in (("Top activations", 8.0), ("Subsample interval 5", 3.0)):
            examples = []
            for _ in range(5):
                centre = int(rng.integers(4, len(words) - 3))
                acts = np.maximum(0, top * np.exp(-0.9 * (np.arange(len(words)) - centre) ** 2) - 0.05).round(3)
                example: dict[str, Any] = {
                    "tokens": [f" {word}" for word in words],
                    "tokens_acts_list": acts.tolist(),
                    "train_token_ind": centre,
                    "is_repeated_datapoint": False,
                }
                examples.append(example)
            quantiles.append({"quantile_name": name, "examples": examples})
        number = (layer + feature) * (layer + feature + 1) // 2 + feature
        record = {
            "transcoder_id": "synthetic-clt",
            "index": number,
            "examples_quantiles": quantiles,
            "top_logits": [" Austin", " Texas", " Dallas", " capital"],
            "bottom_logits": [" banana", "\n", " qu"],
            "act_min": 0.0,
            "act_max": 8.0,
            "activation_frequency": 0.0123,
        }
        (folder / f"{number}.json").write_text(json.dumps(record))
    return folder


def binary_record(content: dict[str, Any]) -> bytes:
    """A record of circuit-tracer's binary layout."""
    packed = zlib.compress(json.dumps(content).encode())
    return struct.pack("<I", len(packed)) + packed
