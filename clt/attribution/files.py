"""A graph on disk: graph.json, graph.safetensors and the prompt's images (docs/attribution.md)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clt.attribution.graph import AttributionGraph, Edges, Patch, Position, TargetNode
from clt.config.base import readable_as_usual, write_text_atomically
from clt.errors import GraphError

FORMAT = "crosslayer-graph"
VERSION = 1
JSON, TENSORS = "graph.json", "graph.safetensors"
_OWN = ("format", "format_version", "prompt", "n_layers", "positions", "targets", "images")


def save_graph(graph: AttributionGraph, folder: Path) -> None:
    """Write all files, graph.json last: a folder without it is unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "features": graph.features,
        "activations": graph.activations,
        "row_start": graph.edges.row_start,
        "source": graph.edges.source,
        "weight": graph.edges.weight,
        "row_value": graph.row_value,
        "influence": graph.influence,
        "cumulative": graph.cumulative,
        "active_features": graph.active_features,
        "active_values": graph.active_values,
    }
    temporary = folder / f".{TENSORS}.tmp"
    with readable_as_usual(temporary):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"format": FORMAT})
    temporary.replace(folder / TENSORS)
    files = []
    for number, image in enumerate(graph.images):
        files.append({"file": f"image_{number}.png", "width": image.width, "height": image.height})
        image.save(folder / files[-1]["file"])
    write_text_atomically(folder / JSON, json.dumps(_described(graph, files), ensure_ascii=False, indent=1) + "\n")


def _described(graph: AttributionGraph, files: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "prompt": graph.prompt,
        "n_layers": graph.n_layers,
        **{name: value for name, value in graph.info.items() if name not in _OWN},
        "positions": [asdict(position) for position in graph.positions],
        "targets": [asdict(target) for target in graph.targets],
        "images": files,
    }


def load_graph(folder: Path) -> AttributionGraph:
    """Read a graph folder, checking that its two files belong together."""
    described = _read_json(folder)
    tensors = _read_tensors(folder / TENSORS)
    edges = Edges(tensors["row_start"], tensors["source"], tensors["weight"])
    graph = AttributionGraph(
        features=tensors["features"],
        activations=tensors["activations"],
        positions=[_position(each) for each in described["positions"]],
        targets=[TargetNode(**each) for each in described["targets"]],
        edges=edges,
        row_value=tensors["row_value"],
        active_features=tensors["active_features"],
        active_values=tensors["active_values"],
        n_layers=described["n_layers"],
        prompt=described["prompt"],
        info={name: value for name, value in described.items() if name not in _OWN},
        images=[_image(folder / each["file"]) for each in described["images"]],
    )
    rows = graph.n_features + len(graph.targets)
    if edges.n_rows != rows or len(tensors["influence"]) != graph.n_nodes:
        raise GraphError(
            f"{folder}: {TENSORS} has {edges.n_rows} rows and {len(tensors['influence'])} nodes, {JSON} describes "
            f"{rows} and {graph.n_nodes}. The two files are of different graphs; write the graph again."
        )
    # Computed before saving: no reader computes them again.
    graph.__dict__.update(influence=tensors["influence"], cumulative=tensors["cumulative"])
    return graph


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / JSON
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GraphError(f"{folder} is no graph: it has no {JSON}. `clt attribute --out FOLDER` writes one.") from None
    except ValueError as error:
        raise GraphError(f"{path} is no whole JSON file: {error}. Copy or compute the graph again.") from None
    if described.get("format") != FORMAT or described.get("format_version") != VERSION:
        raise GraphError(
            f"{path} says format {described.get('format')!r}, version {described.get('format_version')!r}; this "
            f"version reads {FORMAT!r}, version {VERSION}. Import other projects' graphs with "
            "`clt.attribution.read_circuit_tracer_json` or `read_circuit_tracer_pt`."
        )
    return described


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise GraphError(f"{path} does not exist, though {JSON} does. Copy the whole folder.") from None
    except SafetensorError as error:
        raise GraphError(f"{path} is no whole safetensors file: {error}. Copy or compute the graph again.") from None
    names = ("features", "activations", "row_start", "source", "weight", "row_value", "influence", "cumulative")
    missing = [name for name in (*names, "active_features", "active_values") if name not in tensors]
    if missing:
        raise GraphError(f"{path} lacks {', '.join(missing)}. It is not a graph of this format; compute it again.")
    return tensors


def _position(values: dict[str, Any]) -> Position:
    patch = values["patch"]
    if patch is not None:
        patch = Patch(**{**patch, "box": tuple(patch["box"])})
    return Position(**{**values, "patch": patch})


def _image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise GraphError(f"{path} cannot be read ({error}), though {JSON} names it. Copy the whole folder.") from None
