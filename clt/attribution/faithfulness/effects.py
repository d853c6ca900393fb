"""Predicted against real effects of switching features off, in the host itself.

    perturbation   the change that the local replacement model predicts when a feature is switched off against the
                   host's, by distance in layers:
                     read       of what a later layer reads, the feature's own writing and all reactions together
                     reaction   of what a later MLP writes, without what the feature itself wrote there
                     held       the same, with the host's attention patterns held as the prediction holds them
    ablation       influence of a feature in the graph against how much the logits move without it: rank correlation

Ameisen et al. 2025 report cosines of about 0.8 and normalised errors of about 0.4 one layer later, and a rank
correlation of 0.72, for an 18-layer model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from clt.attribution.attribute import attribute
from clt.attribution.faithfulness.host_runs import Edit, deltas, edited_run, predicted_run
from clt.replacement import ReplacementModel
from clt.types import Sample

MEASURES = ("read", "reaction", "held")


def measure_effects(
    model: ReplacementModel, samples: Sequence[Sample], *, per_prompt: int = 24, seed: int = 0
) -> dict[str, Any]:
    """Both measures over the same random active features of each prompt."""
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {name: {} for name in MEASURES}
    ranks: list[float] = []
    rng = torch.Generator().manual_seed(seed)
    for sample in samples:
        graph = attribute(model, sample, max_feature_nodes=None)
        chosen = torch.randperm(graph.n_features, generator=rng)[:per_prompt]
        edits: list[list[Edit]] = [[(layer, place, f, 0.0)] for layer, place, f in graph.features[chosen].tolist()]
        inputs = model.adapter.prepare([sample])
        linear = model.adapter.linearised(inputs)
        added = deltas(model, linear.reads, [[], *edits])
        real, logits = edited_run(model, inputs, added)
        held, _ = edited_run(model, inputs, added, hold_patterns=True)
        predicted = predicted_run(model, linear, added)
        sources = graph.features[chosen, 0].tolist()
        pairs = (real.reads, predicted.reads), (real.wrote, predicted.wrote), (held.wrote, predicted.wrote)
        for name, (truth, guess) in zip(MEASURES, pairs, strict=True):
            _add_curves(curves[name], sources, truth[:, 1:] - truth[:, :1], guess[:, 1:] - guess[:, :1])
        ids = [target.token_id for target in graph.targets]
        centred = logits[:, ids] - logits.mean(1, keepdim=True)
        effect = ((centred[1:] - centred[0]).abs() * graph.target_weights).sum(1)
        if len(chosen) > 2:
            ranks.append(spearman(graph.influence[chosen], effect))
    return {
        "n_prompts": len(samples),
        "by_distance": {
            name: [_summary(distance, pairs) for distance, pairs in sorted(curve.items())]
            for name, curve in curves.items()
        },
        "ablation_spearman": sum(ranks) / len(ranks) if ranks else None,
        "n_ablation_prompts": len(ranks),
    }


def _add_curves(
    curves: dict[int, list[tuple[float, float]]],
    sources: Sequence[int],
    real: Float[Tensor, "layer row position d_model"],
    predicted: Float[Tensor, "layer row position d_model"],
) -> None:
    """Cosine and normalised error of one prompt's changes, by distance from the feature's layer."""
    for row, source in enumerate(sources):
        for layer in range(source + 1, len(real)):
            truth, guess = real[layer, row].flatten().double(), predicted[layer, row].flatten().double()
            size = truth.square().sum()
            if float(size) > 1e-16:
                cosine = float(torch.cosine_similarity(truth, guess, dim=0))
                curves.setdefault(layer - source, []).append((cosine, float((truth - guess).square().sum() / size)))


def _summary(distance: int, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    table = torch.tensor(pairs, dtype=torch.float64)
    return {
        "distance": distance,
        "n": len(pairs),
        "cosine": float(table[:, 0].mean()),
        "nmse_median": float(table[:, 1].median()),
    }


def spearman(first: Float[Tensor, " node"], second: Float[Tensor, " node"]) -> float:
    """Rank correlation; equal values share the mean of their ranks."""
    table = torch.stack([_ranks(first), _ranks(second)])
    if bool((table.std(1) == 0).any()):
        return 0.0
    return float(torch.corrcoef(table)[0, 1])


def _ranks(values: Float[Tensor, " node"]) -> Float64[Tensor, " node"]:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
