"""Steering without a transcoder: scale neurons of the plain host so that they do what the features would.

Scaling features by g changes the MLP output of layer t by `Delta_t = sum over features (g - 1) a W_dec_{.->t}`. Scaling
neurons by gamma changes it by `sum over neurons (gamma - 1) h W_down_t[:, n]`. The gammas are the ridge least-squares
fit of the second to the first over the tokens of the selection answers; folded into the columns of the down
projection they cost nothing at run time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clt.config.base import write_text_atomically
from clt.discovery.steering import Factors, fixed_gains
from clt.errors import DiscoveryError
from clt.lm import HostInputs, ModelAdapter
from clt.models import BaseTranscoder
from clt.replacement.passes import Passes
from clt.types import FeatureId

FORMAT = "crosslayer-neuron-patch-1"


@dataclass(frozen=True)
class NeuronPatch:
    """Factors on neurons of a host's MLPs."""

    model: str
    n_layers: int
    widths: tuple[int, ...]
    """Neurons per layer of the host it was made for."""
    factors: Mapping[FeatureId, float]
    """(layer, neuron) -> factor."""

    def save(self, path: Path) -> None:
        """As JSON, one entry per neuron."""
        neurons = [{"layer": key.layer, "neuron_idx": key.feature, "factor": f} for key, f in self.factors.items()]
        content = {"format": FORMAT, "model": self.model, "widths": list(self.widths), "neurons": neurons}
        write_text_atomically(path, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> NeuronPatch:
        """Read what `save` wrote.

        Raises:
            DiscoveryError: the file is missing, damaged or of another format.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DiscoveryError(
                f"{path} does not exist. `clt phase steer` writes a patch when it steers neurons."
            ) from None
        except json.JSONDecodeError as error:
            raise DiscoveryError(f"{path} is not JSON (line {error.lineno}: {error.msg}).") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DiscoveryError(f"{path} is no neuron patch: it must be a JSON object with format {FORMAT!r}.")
        factors = {FeatureId(row["layer"], row["neuron_idx"]): float(row["factor"]) for row in content["neurons"]}
        return NeuronPatch(content["model"], len(content["widths"]), tuple(content["widths"]), factors)


def fit_patch(
    adapter: ModelAdapter,
    transcoder: BaseTranscoder,
    factors: Factors,
    batches: Sequence[HostInputs],
    *,
    candidates: Mapping[int, Sequence[int]] | None = None,
    ridge: float = 0.01,
    largest: float = 4.0,
) -> NeuronPatch:
    """The neuron factors that best imitate scaling these features on these texts.

    Args:
        batches: prompts with answers.
        candidates: which neurons of each layer may move; None: all.
        ridge: pull of the factors towards 1, relative to the mean strength of the neurons' own writing.
        largest: factors stay between -largest and largest.
    """
    fits = [_LayerFit(matrix) for matrix in down_matrices(adapter)]
    for inputs in batches:
        wanted, hidden = _read(adapter, transcoder, factors, inputs)
        for layer, fit in enumerate(fits):
            if layer in wanted:
                fit.add(hidden[layer], wanted[layer])
    found: dict[FeatureId, float] = {}
    for layer, fit in enumerate(fits):
        neurons = range(fit.width) if candidates is None else candidates.get(layer, ())
        for neuron, factor in fit.solve(list(neurons), ridge).items():
            found[FeatureId(layer, neuron)] = max(-largest, min(largest, factor))
    return NeuronPatch(adapter.name, adapter.n_layers, tuple(adapter.neuron_counts), found)


def apply_patch(adapter: ModelAdapter, patch: NeuronPatch) -> int:
    """Fold the factors into the host's weights; returns how many neurons were scaled.

    Raises:
        DiscoveryError: the patch is for a host of other sizes, or scales a neuron it does not have.
    """
    widths = tuple(adapter.neuron_counts)
    if widths != patch.widths:
        raise DiscoveryError(
            f"The patch is for {patch.model} with neurons per layer {list(patch.widths)[:4]}..., this host has "
            f"{list(widths)[:4]}... ({len(patch.widths)} and {len(widths)} layers). Use the host it was made for."
        )
    matrices = down_matrices(adapter)
    for (layer, neuron), factor in patch.factors.items():
        if not (0 <= layer < len(widths) and 0 <= neuron < widths[layer]):
            raise DiscoveryError(f"The patch scales neuron {neuron} of layer {layer}, which the host does not have.")
        with torch.no_grad():
            matrices[layer][:, neuron] *= factor
    return len(patch.factors)


def down_matrices(adapter: ModelAdapter) -> list[Float[Tensor, "d_model neuron"]]:
    """Views of the matrices through which each MLP's neurons write to the residual stream.

    Raises:
        HostModelError: an MLP whose neurons cannot be told apart.
    """
    matrices = []
    for module, width in zip(adapter.down_projections, adapter.neuron_counts, strict=True):
        weight = module.weight
        assert isinstance(weight, Tensor)
        # GPT-2's Conv1D keeps [in, out], everything else [out, in].
        is_transposed = not isinstance(module, nn.Linear) and weight.shape[0] == width
        matrices.append(weight.detach().T if is_transposed else weight.detach())
    return matrices


def mean_neuron_strength(adapter: ModelAdapter, batches: Sequence[HostInputs]) -> list[Float[Tensor, " neuron"]]:
    """Mean absolute activation of every neuron over the tokens of the batches."""
    sums = [torch.zeros(width, device=adapter.device) for width in adapter.neuron_counts]
    n_tokens = 0
    for inputs in batches:
        keep = inputs.is_token.reshape(-1)
        n_tokens += int(keep.sum())
        for layer, hidden in _neurons(adapter, inputs).items():
            sums[layer] += hidden[keep.to(hidden.device)].float().abs().sum(0)
    return [each / max(n_tokens, 1) for each in sums]


def _neurons(adapter: ModelAdapter, inputs: HostInputs) -> dict[int, Float[Tensor, "token neuron"]]:
    seen: dict[int, Tensor] = {}

    def look(layer: int, hidden: Tensor) -> Tensor:
        seen[layer] = hidden.detach().reshape(-1, hidden.shape[-1])
        return hidden

    with adapter.rewriting_neurons(look, range(adapter.n_layers)):
        adapter.logits(inputs)
    return seen


@torch.no_grad()
def _read(
    adapter: ModelAdapter, transcoder: BaseTranscoder, factors: Factors, inputs: HostInputs
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What the factors would change of each MLP output, and the neurons, both at the real tokens."""
    keep = inputs.is_token.reshape(-1)
    changes: dict[int, Tensor] = {}
    config = transcoder.config
    gains = fixed_gains(factors, [config.num_features] * config.num_layers)
    passes = Passes(adapter, inputs)

    def spend(layer: int, x: Tensor) -> None:
        if layer not in gains.layers:
            return
        tokens = x.reshape(-1, x.shape[-1])[keep.to(x.device)]
        before = transcoder.encode_layer(layer, tokens)
        after = gains.scale(layer, before, lambda: passes.parts().reshape(-1)[keep])
        for target, part in zip(config.targets_of(layer), transcoder.contributions(layer, after - before)):
            changes[target] = changes[target] + part if target in changes else part

    with passes.watching(), adapter.reading(spend):
        hidden = _neurons(adapter, inputs)
    return changes, {layer: each[keep.to(each.device)] for layer, each in hidden.items()}


class _LayerFit:
    """Normal equations of one layer's neuron factors."""

    def __init__(self, down: Float[Tensor, "d_model neuron"]) -> None:
        self._down = down.double()
        self.width = down.shape[1]
        self._products = torch.zeros(self.width, self.width, dtype=torch.float64, device=down.device)
        self._wanted = torch.zeros(self.width, dtype=torch.float64, device=down.device)

    def add(self, hidden: Float[Tensor, "token neuron"], wanted: Float[Tensor, "token d_model"]) -> None:
        hidden, wanted = hidden.double(), wanted.double()
        self._products += hidden.T @ hidden
        self._wanted += (hidden * (wanted @ self._down)).sum(0)

    def solve(self, neurons: Sequence[int], ridge: float) -> dict[int, float]:
        if not neurons or not self._wanted.any():
            return {}
        at = torch.tensor(neurons)
        down = self._down[:, at]
        matrix = self._products[at][:, at] * (down.T @ down)
        matrix = matrix + ridge * matrix.diagonal().mean() * torch.eye(len(at), dtype=matrix.dtype)
        change = torch.linalg.solve(matrix, self._wanted[at])
        return {neuron: 1 + float(value) for neuron, value in zip(neurons, change)}


def describe_patch(patch: NeuronPatch) -> dict[str, Any]:
    """Counts for people."""
    values = list(patch.factors.values())
    return {"neurons": len(values), "least": min(values, default=1.0), "largest": max(values, default=1.0)}
