"""The per-layer files of vlm-clt-training: `L{l}/batch_{i}_x.pt` and `batch_{i}_y.pt`.

x: what layer l's MLP reads, [sample, position, d_model]; y: the MLP outputs of the next layers, one tensor per target.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clt.errors import DatasetError


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
