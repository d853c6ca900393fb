"""Mean and spread of every dimension, summed up while rows are written and read back from `norm_stats.json`."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from clt.errors import DatasetError

SIDES = ("inputs", "targets")


@dataclass(frozen=True)
class SideStatistics:
    """What the inputs (or the targets) of all layers look like."""

    mean: Float64[Tensor, "layer d_model"]
    std: Float64[Tensor, "layer d_model"]
    """Unbiased, per dimension."""
    mean_squared_norm: Float64[Tensor, " layer"]
    """Mean over tokens of the squared length of the vector."""


@dataclass(frozen=True)
class Statistics:
    """Per-layer statistics of a data set, over all its tokens."""

    count: int
    inputs: SideStatistics
    targets: SideStatistics


class RunningStatistics:
    """Counts, means and squared deviations of rows that arrive in parts; float64 throughout.

    Source: Chan, Golub & LeVeque 1979, the parallel update of mean and variance.
    """

    def __init__(self, num_layers: int, d_model: int) -> None:
        self.count = 0
        self.mean = torch.zeros(2, num_layers, d_model, dtype=torch.float64)
        self.deviation = torch.zeros_like(self.mean)

    def update(self, rows: Float[Tensor, "token side layer d_model"]) -> None:
        """Add some rows."""
        values = rows.to(torch.float64)
        mean = values.mean(dim=0)
        self._add(rows.shape[0], mean, values.sub_(mean).square_().sum(dim=0))

    def merge(self, other: "RunningStatistics") -> None:
        """Add everything that another one has seen."""
        if other.count:
            self._add(other.count, other.mean, other.deviation)

    def _add(self, n_new: int, mean: Tensor, deviation: Tensor) -> None:
        total = self.count + n_new
        shift = mean - self.mean
        self.deviation += deviation + shift.square() * (self.count * n_new / total)
        self.mean += shift * (n_new / total)
        self.count = total

    def result(self) -> Statistics:
        """The statistics of everything seen so far."""
        variance = self.deviation / max(self.count - 1, 1)
        squared_norm = (self.deviation / max(self.count, 1) + self.mean.square()).sum(dim=-1)
        sides = [
            SideStatistics(
                mean=self.mean[side].clone(), std=variance[side].sqrt(), mean_squared_norm=squared_norm[side]
            )
            for side in range(2)
        ]
        return Statistics(count=self.count, inputs=sides[0], targets=sides[1])

    def state(self) -> dict[str, Tensor]:
        """What `load` needs to go on from here, exactly."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "deviation": self.deviation}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved `state`."""
        self.count = int(state["count"])
        self.mean = state["mean"].clone()
        self.deviation = state["deviation"].clone()


def statistics_to_json(statistics: Statistics) -> str:
    """The seeds' `norm_stats.json`: layer -> side -> mean and std, plus the mean squared norm and the count."""
    num_layers = statistics.inputs.mean.shape[0]
    layers = {
        str(layer): {
            name: {
                "mean": side.mean[layer].tolist(),
                "std": side.std[layer].tolist(),
                "mean_squared_norm": side.mean_squared_norm[layer].item(),
                "count": statistics.count,
            }
            for name, side in zip(SIDES, (statistics.inputs, statistics.targets), strict=True)
        }
        for layer in range(num_layers)
    }
    return json.dumps(layers) + "\n"


def read_statistics(path: Path, num_layers: int, d_model: int, total_tokens: int) -> Statistics:
    """Read `norm_stats.json`, ours or a seed project's (which lacks the norms; they follow from mean and std).

    Raises:
        DatasetError: the file is missing, is no JSON, or lacks a layer, a side or a dimension.
    """
    if not path.exists():
        raise DatasetError(
            f"{path} does not exist, so mean and spread of this data set are unknown.\n"
            "It was probably generated without statistics. `clt data stats DIR` computes them."
        )
    try:
        layers = json.loads(path.read_text())
        sides = [_read_side(layers, name, num_layers, total_tokens) for name in SIDES]
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path} is not JSON (line {error.lineno}: {error.msg}). Was it cut off?") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path} does not have mean and std for inputs and targets of layers 0 to {num_layers - 1} ({error!r}).\n"
            "Delete it and run `clt data stats DIR` to compute it again."
        ) from None
    if sides[0].mean.shape[1] != d_model:
        raise DatasetError(
            f"{path} has {sides[0].mean.shape[1]} dimensions, but metadata.json says d_model = {d_model}.\n"
            "It probably belongs to another data set."
        )
    return Statistics(count=total_tokens, inputs=sides[0], targets=sides[1])


def _read_side(layers: dict, name: str, num_layers: int, total_tokens: int) -> SideStatistics:
    entries = [layers[str(layer)][name] for layer in range(num_layers)]
    mean = torch.tensor([entry["mean"] for entry in entries], dtype=torch.float64)
    std = torch.tensor([entry["std"] for entry in entries], dtype=torch.float64)
    population = std.square() * (max(total_tokens - 1, 1) / max(total_tokens, 1))
    return SideStatistics(mean=mean, std=std, mean_squared_norm=(population + mean.square()).sum(dim=-1))
