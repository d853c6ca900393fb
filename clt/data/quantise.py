"""int8 activations: one scale per token, side and layer, and what that costs."""

from typing import Any

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

LEVELS = 127


def quantise(
    rows: Float[Tensor, "token side layer d_model"],
) -> tuple[Int8[Tensor, "token side layer d_model"], Float32[Tensor, "token side layer"]]:
    """The nearest of 255 evenly spaced values; the largest magnitude of each vector is exact."""
    values = rows.float()
    scale = values.abs().amax(dim=-1) / LEVELS
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (values / safe[..., None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


def dequantise(
    rows: Int8[Tensor, "token side layer d_model"], scale: Float32[Tensor, "token side layer"], dtype: torch.dtype
) -> Float[Tensor, "token side layer d_model"]:
    """The values that `quantise` stands for."""
    return (rows.float() * scale[..., None]).to(dtype)


class QuantisationError:
    """The error of everything quantised so far, per side and layer, in numbers that can be saved and gone on with."""

    def __init__(self, num_layers: int, state: dict[str, Any] | None = None) -> None:
        zeros = [[0.0] * num_layers, [0.0] * num_layers]
        state = state or {"tokens": 0, "error": zeros, "energy": zeros, "cosine": zeros}
        self._tokens = int(state["tokens"])
        self._sums = {name: torch.tensor(state[name], dtype=torch.float64) for name in ("error", "energy", "cosine")}

    def update(
        self,
        exact: Float[Tensor, "token side layer d_model"],
        stored: Float[Tensor, "token side layer d_model"],
    ) -> None:
        """Compare some rows with what was stored for them."""
        exact, stored = exact.double(), stored.double()
        self._tokens += exact.shape[0]
        self._sums["error"] += (exact - stored).square().sum(dim=(0, 3))
        self._sums["energy"] += exact.square().sum(dim=(0, 3))
        cosine = torch.cosine_similarity(exact, stored, dim=-1)
        self._sums["cosine"] += torch.where(exact.any(dim=-1), cosine, 1.0).sum(dim=0)

    def merge(self, other: "QuantisationError") -> None:
        """Add everything that another one has seen."""
        self._tokens += other._tokens
        for name, values in other._sums.items():
            self._sums[name] += values

    def state(self) -> dict[str, Any]:
        """What the constructor needs to go on."""
        return {"tokens": self._tokens, **{name: value.tolist() for name, value in self._sums.items()}}

    def report(self) -> dict[str, Any]:
        """Relative squared error and mean cosine, for inputs and targets of each layer."""
        relative = self._sums["error"] / self._sums["energy"].clamp_min(torch.finfo(torch.float64).tiny)
        cosine = self._sums["cosine"] / max(self._tokens, 1)
        sides = ("inputs", "targets")
        return {
            "scale": "float32, one per token, side and layer",
            "relative_squared_error": {side: relative[i].tolist() for i, side in enumerate(sides)},
            "mean_cosine": {side: cosine[i].tolist() for i, side in enumerate(sides)},
        }
