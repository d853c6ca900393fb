"""Phase 6: chosen features as coordinates of the MLP outputs (the seeds' list) and as true MLP neurons.

A feature's decoder column lives in the residual stream; the seeds call its coordinates neurons, and their list is
kept with `space: "mlp_output"`. A true neuron n of layer t writes W_down_t[:, n]; its score for feature f of source s
is |W_down_t[:, n] . W_dec_{s->t}[:, f]| times the neuron's mean absolute activation: how much of what the feature
writes this neuron writes as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clt.config.base import write_text_atomically
from clt.errors import DiscoveryError
from clt.models import CrossLayerTranscoder
from clt.types import FeatureId

AMPLIFICATION = 2.0


def map_features(
    transcoder: CrossLayerTranscoder,
    features: Sequence[Mapping[str, Any]],
    *,
    top_k: int = 50,
    down: Sequence[Float[Tensor, "d_model neuron"]] | None = None,
    neuron_strength: Sequence[Float[Tensor, " neuron"]] | None = None,
    amplification: float = AMPLIFICATION,
) -> list[dict[str, Any]]:
    """One entry per feature, in the given order.

    Args:
        features: entries of `good_features.json`.
        top_k: how many coordinates and how many neurons.
        down: each layer's matrix from neurons to the residual stream; None leaves the true neurons out.
        neuron_strength: mean absolute activation of each layer's neurons; None: 1.

    Raises:
        DiscoveryError: a feature that the transcoder does not have.
    """
    config = transcoder.config
    entries = []
    for feature in features:
        layer, index = int(feature["layer"]), int(feature["feature_idx"])
        if not (0 <= layer < config.num_layers and 0 <= index < config.num_features):
            raise DiscoveryError(
                f"Feature {layer}:{index} is not in the transcoder, which has {config.num_layers} layers of "
                f"{config.num_features} features. The features were found with another transcoder."
            )
        decoders = feature_decoders(transcoder, FeatureId(layer, index))
        entry: dict[str, Any] = {
            "feature": {name: feature[name] for name in ("layer", "feature_idx", "goodness_score") if name in feature},
            "top_mlp_neurons": _coordinates(decoders, top_k),
            "amplification_factor": amplification,
            "space": "mlp_output",
        }
        if down is not None:
            entry["true_mlp_neurons"] = _neurons(decoders, down, neuron_strength, top_k)
        entries.append(entry)
    return entries


def feature_decoders(transcoder: CrossLayerTranscoder, feature: FeatureId) -> dict[int, Float[Tensor, " d_model"]]:
    """What the feature writes to each MLP output at activation 1, in the host's units."""
    one = torch.zeros(1, transcoder.config.num_features, device=transcoder.bias(0).device)
    one[0, feature.feature] = 1
    with torch.no_grad():
        parts = transcoder.contributions(feature.layer, one)
    targets = transcoder.config.targets_of(feature.layer)
    return {target: part[0].float() for target, part in zip(targets, parts)}


def save_mapping(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write the list of entries; the guide prints one of them."""
    write_text_atomically(path, json.dumps(list(entries), indent=2) + "\n")


def _coordinates(decoders: Mapping[int, Float[Tensor, " d_model"]], top_k: int) -> list[dict[str, Any]]:
    """The seeds' list: largest coordinates of the feature's decoder, summed over the layers it writes to."""
    total = torch.stack(list(decoders.values())).sum(0) if decoders else torch.zeros(0)
    order = total.abs().topk(min(top_k, len(total))).indices.tolist()
    return [{"neuron_idx": place, "weight": float(total[place])} for place in order]


def _neurons(
    decoders: Mapping[int, Float[Tensor, " d_model"]],
    down: Sequence[Float[Tensor, "d_model neuron"]],
    strength: Sequence[Float[Tensor, " neuron"]] | None,
    top_k: int,
) -> list[dict[str, Any]]:
    """The neurons of all target layers that write most of what the feature writes."""
    found: list[tuple[float, int, int, float]] = []
    for layer, decoder in decoders.items():
        overlap = down[layer].float().T @ decoder
        score = overlap.abs() * (1 if strength is None else strength[layer].to(overlap))
        values, places = score.topk(min(top_k, len(score)))
        found += [(float(v), layer, int(n), float(overlap[n])) for v, n in zip(values, places)]
    found.sort(key=lambda row: -row[0])
    return [
        {"layer": layer, "neuron_idx": neuron, "weight": overlap, "score": score}
        for score, layer, neuron, overlap in found[:top_k]
    ]
