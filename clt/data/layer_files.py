"""The per-layer files of vlm-clt-training: `L{l}/batch_{i}_x.pt` and `batch_{i}_y.pt`.

x: what layer l's MLP reads, [sample, position, d_model]; y: the MLP outputs of the next layers, one tensor per target.
A target past the last layer is absent, so the last layer, which has none, has no folder.

Each MLP output is stored once, in `targets/L{t}/batch_{i}.pt`, and y names those files; in the seed's own layout y
holds a copy of every target.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from clt.data.files import refusing_a_full_disk, replace_file, write_file
from clt.data.progress import require_same_plan
from clt.errors import ConfigError, DatasetError
from clt.types import ActivationBatch

CAPTURE_FILE = "capture.json"


class LayerFileWriter:
    """Writes activations batch by batch; one batch is in memory at a time, and a killed capture can go on.

    Sequences of one length share a file, so that nothing is padding.

    Args:
        folder: gets L0, L1, ..., targets, and capture.json, which says how far the capture is.
        n_targets: how many following layers each layer predicts, where they exist.
        plan: what else decides about the content; an unfinished capture with another plan is not gone on with.
        seed_layout: copy every target into each y, as vlm-clt-training does: `n_targets` + 1 times the inputs' bytes.

    Raises:
        ConfigError: `n_targets` is not positive.
        DatasetError: the folder holds another capture, which would be mixed with this one.
    """

    def __init__(
        self, folder: Path, n_targets: int, plan: Mapping[str, Any] | None = None, *, seed_layout: bool = False
    ) -> None:
        if n_targets < 1:
            raise ConfigError(f"n_targets = {n_targets}: a layer must predict at least one following layer.")
        self._folder = folder
        self._n_targets = n_targets
        self._seed_layout = seed_layout
        self._plan = {**(plan or {}), "n_targets": n_targets, "seed_layout": seed_layout}
        self.samples = 0
        """Samples whose files are complete."""
        self.n_files = 0
        """File pairs per layer so far."""
        self.is_finished = False
        """Whether an earlier capture with this plan wrote everything."""
        self._go_on()

    def append(self, batch: ActivationBatch) -> None:
        """Write the sequences of a batch; a sequence is a run of tokens with one sample number.

        Raises:
            DatasetError: the host has one layer, hence no targets, or the disk is full.
        """
        if batch.n_layers < 2:
            raise DatasetError("The host has one layer, so no following layer is there to predict.")
        if self.samples == 0:
            self._note()  # so that what a kill in the first batch leaves is known to be of this capture
        _, lengths = batch.sample.cpu().unique_consecutive(return_counts=True)
        starts = lengths.cumsum(0) - lengths
        for length in lengths.unique().tolist():
            tokens = (starts[lengths == length, None] + torch.arange(length)).to(batch.inputs.device)
            self._write(batch, tokens)
            self.n_files += 1
        self.samples += len(lengths)
        self._note()

    def finish(self) -> None:
        """Mark the capture as complete."""
        self.is_finished = True
        self._note()

    def _go_on(self) -> None:
        path = self._folder / CAPTURE_FILE
        if path.exists():
            try:
                saved = json.loads(path.read_text())
                plan, self.samples, self.n_files = saved["plan"], int(saved["samples"]), int(saved["n_files"])
                self.is_finished = bool(saved["is_finished"])
            except (KeyError, TypeError, ValueError) as error:
                raise DatasetError(f"{path} is damaged ({error!r}). Delete {self._folder} and capture anew.") from None
            require_same_plan(self._folder, plan, self._plan)
        elif found := next(self._folder.glob("L*/batch_*.pt"), None):
            raise DatasetError(
                f"{self._folder} already holds a capture (such as {found.relative_to(self._folder)}). Delete it, or "
                "choose another folder: samples of two captures would be mixed."
            )

    def _note(self) -> None:
        state = {"samples": self.samples, "n_files": self.n_files, "is_finished": self.is_finished}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(self._folder / CAPTURE_FILE, (json.dumps({"plan": self._plan, **state}, indent=2) + "\n").encode())

    def _write(self, batch: ActivationBatch, tokens: Integer[Tensor, "sample position"]) -> None:
        if not self._seed_layout:
            for layer in range(1, batch.n_layers):
                _save({"data": batch.targets[layer][tokens].cpu()}, self._folder / self._target(layer))
        for layer in range(batch.n_layers - 1):
            following = range(layer + 1, min(layer + 1 + self._n_targets, batch.n_layers))
            if self._seed_layout:
                targets = [batch.targets[target][tokens].cpu() for target in following]
                y: dict[str, Any] = {"y": targets[0], "targets": targets}
            else:
                y = {"linked_targets": [f"../{self._target(target)}" for target in following]}
            stem = self._folder / f"L{layer}" / f"batch_{self.n_files}"
            # The targets first: readers look for x, and then expect y beside it.
            _save({**y, "n_targets": len(following)}, stem.with_name(f"{stem.name}_y.pt"))
            _save({"x": batch.inputs[layer][tokens].cpu()}, stem.with_name(f"{stem.name}_x.pt"))

    def _target(self, layer: int) -> str:
        return f"targets/L{layer}/batch_{self.n_files}.pt"


class LayerFiles:
    """The pairs of files of one layer, the last few kept in memory."""

    def __init__(self, folder: Path, cached_files: int = 50) -> None:
        """List the pairs.

        Raises:
            DatasetError: there are none, or an x has no y.
        """
        self._pairs = []
        for x in sorted(folder.glob("batch_*_x.pt"), key=_number):
            y = x.with_name(x.name.replace("_x.pt", "_y.pt"))
            if not y.exists():
                raise DatasetError(f"{x} has no {y.name} beside it. Capture the layer again or delete the file.")
            self._pairs.append((x, y))
        if not self._pairs:
            raise DatasetError(f"{folder} holds no batch_*_x.pt. Give the folder that contains L0, L1, ...")
        self._cached_files = max(1, cached_files)
        self._cache: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pairs)

    def read(
        self, index: int
    ) -> tuple[Float[Tensor, "sample position d_model"], Float[Tensor, "sample position target d_model"]]:
        """Inputs and all targets of one pair of files.

        Raises:
            DatasetError: a file is damaged, or the two do not fit.
        """
        if index not in self._cache:
            self._cache[index] = _load_pair(*self._pairs[index])
            if len(self._cache) > self._cached_files:
                self._cache.popitem(last=False)
        return self._cache[index]


def present_targets(targets: Float[Tensor, "*any target d_model"]) -> Bool[Tensor, " target"]:
    """Which targets exist: beyond the last layer, the seed's capture wrote zeros."""
    return (targets != 0).flatten(0, -3).any(-1).any(0)


def _save(values: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = [value for value in (*values.values(), *values.get("targets", ())) if isinstance(value, Tensor)]
    with refusing_a_full_disk(path.parent, sum(tensor.nbytes for tensor in tensors)):
        with temporary.open("wb") as file:
            torch.save(values, file)
        replace_file(temporary, path)


def _number(path: Path) -> tuple[int, str]:
    middle = path.name.split("_")[1]
    return (int(middle) if middle.isdigit() else 0, path.name)


def _load_pair(x_path: Path, y_path: Path) -> tuple[Tensor, Tensor]:
    x, y = _load(x_path), _load(y_path)
    inputs = _samples(x["x"] if "x" in x else x["data"])
    if "linked_targets" in y:
        y = {"targets": [_linked(y_path, str(name)) for name in y["linked_targets"]]}
    targets = [_samples(part) for part in y.get("targets") or [y["y"] if "y" in y else y["data"]]]
    if any(part.shape != inputs.shape for part in targets):
        shapes = {tuple(part.shape) for part in targets}
        raise DatasetError(
            f"{x_path} is {tuple(inputs.shape)}, but {y_path.name} has {shapes}. They do not belong together."
        )
    return inputs, torch.stack(targets, dim=2)


def _linked(y_path: Path, name: str) -> Tensor:
    path = (y_path.parent / name).resolve()
    if not path.is_relative_to(y_path.parents[1].resolve()):
        raise DatasetError(f"{y_path} names a target outside its capture: {name!r}. The file was edited or is damaged.")
    return _load(path)["data"]


def _load(path: Path) -> dict[str, Any]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing. Copy the capture with all its folders, or capture it again.") from None
    except (RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise DatasetError(f"{path} cannot be read: {error}. It was probably cut off; capture it again.") from None
    return values if isinstance(values, dict) else {"data": values}


def _samples(values: Tensor) -> Tensor:
    """[sample, position, d_model], also from [sample, 1, position, d_model]."""
    return values.squeeze(1) if values.dim() == 4 else values
