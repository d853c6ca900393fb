"""The per-layer files of vlm-clt-training: `L{l}/batch_{i}_x.pt` and `batch_{i}_y.pt`.

x: what layer l's MLP reads, [sample, position, d_model]; y: the MLP outputs of the next layers, one tensor per target.
A target past the last layer is absent, so the last layer, which has none, has no folder.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from clt.data.files import refusing_a_full_disk, replace_file
from clt.errors import ConfigError, DatasetError
from clt.types import ActivationBatch


class LayerFileWriter:
    """Writes activations batch by batch in the seed's layout; one batch is in memory at a time.

    Every target is stored under each layer that predicts it, as in the seed: `n_targets` + 1 times the inputs'
    bytes. `clt generate` stores everything once. Sequences of one length share a file, so that nothing is padding.

    Args:
        folder: gets L0, L1, ...
        n_targets: how many following layers each layer predicts, where they exist.

    Raises:
        ConfigError: `n_targets` is not positive.
        DatasetError: the folder holds files of an earlier capture, which would be mixed with these.
    """

    def __init__(self, folder: Path, n_targets: int) -> None:
        if n_targets < 1:
            raise ConfigError(f"n_targets = {n_targets}: a layer must predict at least one following layer.")
        if found := next(folder.glob("L*/batch_*.pt"), None):
            raise DatasetError(
                f"{folder} already holds a capture (such as {found.relative_to(folder)}). Delete it, or choose "
                "another folder: samples of two captures would be mixed."
            )
        self._folder = folder
        self._n_targets = n_targets
        self.n_files = 0
        """File pairs per layer so far."""

    def append(self, batch: ActivationBatch) -> None:
        """Write the sequences of a batch; a sequence is a run of tokens with one sample number.

        Raises:
            DatasetError: the host has one layer, hence no targets, or the disk is full.
        """
        if batch.n_layers < 2:
            raise DatasetError("The host has one layer, so no following layer is there to predict.")
        _, lengths = batch.sample.cpu().unique_consecutive(return_counts=True)
        starts = lengths.cumsum(0) - lengths
        for length in lengths.unique().tolist():
            tokens = (starts[lengths == length, None] + torch.arange(length)).to(batch.inputs.device)
            for layer in range(batch.n_layers - 1):
                self._write(layer, batch, tokens)
            self.n_files += 1

    def _write(self, layer: int, batch: ActivationBatch, tokens: Integer[Tensor, "sample position"]) -> None:
        following = range(layer + 1, min(layer + 1 + self._n_targets, batch.n_layers))
        targets = [batch.targets[target][tokens].cpu() for target in following]
        stem = self._folder / f"L{layer}"
        stem.mkdir(parents=True, exist_ok=True)
        # The targets first: readers look for x, and then expect y beside it.
        _save({"y": targets[0], "targets": targets, "n_targets": len(targets)}, stem / f"batch_{self.n_files}_y.pt")
        _save({"x": batch.inputs[layer][tokens].cpu()}, stem / f"batch_{self.n_files}_x.pt")


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
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = values.get("targets") or [values["x"]]
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
    targets = [_samples(part) for part in y.get("targets") or [y["y"] if "y" in y else y["data"]]]
    if any(part.shape != inputs.shape for part in targets):
        shapes = {tuple(part.shape) for part in targets}
        raise DatasetError(
            f"{x_path} is {tuple(inputs.shape)}, but {y_path.name} has {shapes}. They do not belong together."
        )
    return inputs, torch.stack(targets, dim=2)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}. It was probably cut off; capture it again.") from None
    return values if isinstance(values, dict) else {"data": values}


def _samples(values: Tensor) -> Tensor:
    """[sample, position, d_model], also from [sample, 1, position, d_model]."""
    return values.squeeze(1) if values.dim() == 4 else values
