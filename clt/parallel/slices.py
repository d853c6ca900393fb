"""Ranks write one checkpoint together: each its slices, the first rank the index; any number of ranks can read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from clt.errors import CheckpointError
from clt.models import CrossLayerTranscoder
from clt.models.checkpoint import CONFIG, save_tensors, save_transcoder
from clt.models.slices import Piece, Sliced, Slices, dtype_name, merge, part_name, part_of, stored_axis, write_index
from clt.parallel.collectives import agreed
from clt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Held:
    """What one rank writes of one tensor."""

    tensor: Tensor
    axis: int | None
    start: int
    total: int


def held(name: str, tensor: Tensor, n_features: int, rows: range) -> Held:
    """A tensor of a checkpoint of which these rows (features) are here."""
    axis = stored_axis(name, tensor.dim())
    return Held(tensor, axis, 0 if axis is None else rows.start, 1 if axis is None else n_features)


def features_of(n_features: int, mesh: Mesh) -> range:
    """The features this rank holds."""
    return part_of(n_features, mesh.tp.rank, mesh.tp.size)


def held_weights(model: CrossLayerTranscoder, mesh: Mesh) -> dict[str, Held]:
    """What this rank writes of a transcoder: the first copy of each part its slices, the first rank what is shared."""
    if mesh.dp.rank != 0:
        return {}
    n_features = model.peers.whole.num_features
    rows = features_of(n_features, mesh)
    every = {f"clt/{name}": value for name, value in model.state_dict().items()}
    return {name: held(name, value, n_features, rows) for name, value in every.items()}


@dataclass(frozen=True)
class Part:
    """What one rank writes of a checkpoint."""

    file: str
    tensors: dict[str, Tensor]
    entries: dict[str, Sliced]
    """What the index says of them."""


def own_part(mine: Mapping[str, Held], mesh: Mesh) -> Part:
    """This rank's slices. What is not cut is written by the first rank."""
    file = part_name(mesh.rank, mesh.size)
    chosen = {name: each for name, each in mine.items() if each.axis is not None or mesh.is_main}
    tensors = {name: each.tensor for name, each in chosen.items()}
    return Part(file, tensors, {name: _entry(name, file, each) for name, each in chosen.items()})


def save_slices(folder: Path, mine: Mapping[str, Held], mesh: Mesh) -> None:
    """Write every rank's slices and the index.

    Raises:
        CheckpointError: on every rank, if one of them could not write.
    """
    part = own_part(mine, mesh)
    join_parts(folder, part.entries, lambda: save_tensors(part.tensors, folder / part.file), mesh)


def join_parts(folder: Path, entries: Mapping[str, Sliced], write: Callable[[], object], mesh: Mesh) -> None:
    """Let every rank write its part (or wait for what writes it), then write the index.

    Raises:
        CheckpointError: on every rank, if one of them could not write.
    """
    failure = None
    try:
        write()
    except CheckpointError as error:
        failure = str(error)
    answers = mesh.world.collect((failure, dict(entries)), "checkpoint slices")
    for failure, _ in answers:
        if failure is not None:
            raise CheckpointError(failure)
    if mesh.is_main:
        write_index(folder, _together([entries for _, entries in answers]))


def _entry(name: str, file: str, each: Held) -> Sliced:
    shape = list(each.tensor.shape)
    stop = 1
    if each.axis is not None:
        stop = each.start + shape[each.axis]
        shape[each.axis] = each.total
    return Sliced(dtype_name(each.tensor.dtype), tuple(shape), each.axis, (Piece(file, name, each.start, stop),))


def _together(entries: list[dict[str, Sliced]]) -> dict[str, Sliced]:
    pieces: dict[str, list[Piece]] = {}
    first: dict[str, Sliced] = {}
    for part in entries:
        for name, each in part.items():
            first.setdefault(name, each)
            pieces.setdefault(name, []).extend(each.pieces)
    ordered = {name: tuple(sorted(each, key=lambda piece: piece.start)) for name, each in pieces.items()}
    return {name: Sliced(each.dtype, each.shape, each.axis, ordered[name]) for name, each in first.items()}


def load_weights(model: CrossLayerTranscoder, folder: Path, mesh: Mesh) -> None:
    """This rank's part of a saved transcoder, whatever number of ranks saved it.

    Raises:
        CheckpointError: its tensors are not those of this transcoder.
    """
    slices = Slices.open(folder)
    n_features = model.peers.whole.num_features
    expected = model.state_dict()
    found = {name.removeprefix("clt/") for name in slices.named("clt/")}
    if found != set(expected):
        names = ", ".join(sorted(found ^ set(expected))[:5])
        raise CheckpointError(f"{folder} is of a transcoder with other tensors ({names}). Is it of another run?")
    rows = features_of(n_features, mesh)
    tensors = {}
    for name, value in expected.items():
        sliced = slices.tensors[f"clt/{name}"]
        tensors[name] = slices.read(f"clt/{name}", None if sliced.axis is None else rows)
        if tensors[name].shape != value.shape or tensors[name].dtype != value.dtype:
            raise CheckpointError(
                f"{folder}: {name} is {sliced.dtype} {sliced.shape}, of which {tuple(value.shape)} {value.dtype} was "
                "expected here. Is it of another run?"
            )
    model.load_state_dict(tensors)


def save_result(model: CrossLayerTranscoder, mesh: Mesh, folder: Path) -> None:
    """Write the whole transcoder in one piece, of which no rank holds more than its own and a slice of one tensor.

    Raises:
        CheckpointError: on every rank, if one of them could not write.
    """
    if mesh.is_alone:
        save_transcoder(model, folder)
        return
    parts = folder / ".result.parts"
    agreed(mesh.world, lambda: _empty(parts), "the folder of the result")
    save_slices(parts, held_weights(model, mesh), mesh)
    agreed(mesh.world, lambda: _merge(model, parts, folder), "the result")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _merge(model: CrossLayerTranscoder, parts: Path, folder: Path) -> None:
    model.peers.whole.to_json(parts / CONFIG)
    merge(parts, folder)
    shutil.rmtree(parts)
