"""Boolean circuits: do the graphs of a transcoder follow the circuit, or take a short cut past its second level?

A cross-layer transcoder can explain the second level by features of the first layer that write past it: right outputs
for the wrong reason (Lange et al. 2026). A per-layer transcoder cannot, and the MLPs' own neurons do not.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from clt.attribution.attribute import attribute
from clt.attribution.faithfulness.models import WINDOWS, fit
from clt.attribution.graph import AttributionGraph
from clt.attribution.targets import Contrast
from clt.config import CLTConfig
from clt.lm import ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from clt.worlds.boolean import NO, YES, BooleanWorld

FORMULAS = (
    BooleanWorld(),
    BooleanWorld(first="and", second="and", combination="xor"),
    BooleanWorld(first="or", second="or", combination="xor"),
    BooleanWorld(first="and", second="or", combination="and"),
)
_FEATURES, _K = 24, 4


def measure_boolean(steps: int = 600) -> dict[str, Any]:
    """For the MLPs' own neurons, a CLT and a PLT, over all inputs of all formulas.

    `gates_found`: where a neuron of the second layer is on, so that the circuit passes through it, share of the neurons
    that are on for which the pruned graph keeps a feature of the same layer that fires on the same inputs;
    `short_cut`: share of the direct effects on the answer (yes minus no) that features of the first layer have, 0 in
    the circuits; `right`: share of inputs that the replacement model answers rightly.
    """
    results: dict[str, Any] = {}
    for kind in ("neurons", *WINDOWS):
        rows = [measure_formula(world, kind, steps) for world in FORMULAS]
        names = ("gates_found", "short_cut", "right", "largest_row_sum_error")
        results[kind] = {name: sum(row[name] for row in rows) / len(rows) for name in names[:3]}
        results[kind]["largest_row_sum_error"] = max(row["largest_row_sum_error"] for row in rows)
    return results


def measure_formula(world: BooleanWorld, kind: str, steps: int) -> dict[str, float]:
    """One circuit and one transcoder."""
    adapter = ModelAdapter(world.host(), name=world.name)
    model = ReplacementModel(adapter, transcoder_of(adapter, kind, steps, world))
    patterns = firing_patterns(model, world)
    found, possible, short_cuts, errors = 0, 0, [], []
    for number, prompt in enumerate(world.prompts().tolist()):
        graph = attribute(model, prompt, targets=[Contrast(YES, NO)], max_feature_nodes=None)
        kept = graph.prune().node_mask[: graph.n_features]
        shown = {(layer, tuple(patterns[layer, :, f].tolist())) for layer, _, f in graph.features[kept].tolist()}
        passes = bool(world.neurons()[1, number].any())
        for layer, neurons in enumerate(world.neurons()):
            for neuron in neurons.T:
                if passes and neuron[number]:
                    possible += 1
                    found += (layer, tuple(neuron.tolist())) in shown
        short_cuts.append(_short_cut(graph))
        errors.append(graph.info["checks"]["row_sum_error"])
    logits = model.logits(adapter.prepare_tokens(world.prompts()))[:, -1]
    right = (logits[:, YES] > logits[:, NO]) == world.answers()
    return {
        "gates_found": found / possible,
        "short_cut": sum(short_cuts) / len(short_cuts),
        "right": float(right.float().mean()),
        "largest_row_sum_error": max(errors),
    }


def transcoder_of(adapter: ModelAdapter, kind: str, steps: int, world: BooleanWorld) -> CrossLayerTranscoder:
    """The MLPs themselves, or a transcoder trained on all inputs."""
    if kind == "neurons":
        return neurons_as_transcoder(adapter)
    batch = adapter.capture(adapter.prepare_tokens(world.prompts()))
    config = CLTConfig(
        num_features=_FEATURES,
        num_layers=adapter.n_layers,
        d_model=adapter.d_model,
        n_targets=WINDOWS[kind],
        activation_fn="topk",
        topk_k=_K,
        normalization_method="none",
    )
    return fit(batch.select(batch.position > 0), config, steps)


@torch.no_grad()
def neurons_as_transcoder(adapter: ModelAdapter) -> CrossLayerTranscoder:
    """The per-layer transcoder whose features are the neurons of ReLU MLPs."""
    blocks = adapter.model.get_submodule("transformer.h")
    config = CLTConfig(
        num_features=adapter.neuron_counts[0],
        num_layers=adapter.n_layers,
        d_model=adapter.d_model,
        n_targets=1,
        activation_fn="relu",
        normalization_method="none",
    )
    transcoder = CrossLayerTranscoder(config)
    for layer, block in enumerate(blocks.children()):
        mlp = block.get_submodule("mlp")
        up, down = mlp.get_submodule("c_fc"), mlp.get_submodule("c_proj")
        transcoder.W_enc[layer].copy_(up.get_parameter("weight").T)
        transcoder.b_enc[layer].copy_(up.get_parameter("bias"))
        transcoder.W_dec[layer].copy_(down.get_parameter("weight")[:, None])
        transcoder.b_dec[layer] = down.get_parameter("bias")
    return transcoder.requires_grad_(False)


def firing_patterns(model: ReplacementModel, world: BooleanWorld) -> Bool[Tensor, "layer input feature"]:
    """On which inputs each feature fires."""
    batch = model.adapter.capture(model.adapter.prepare_tokens(world.prompts()))
    return model.transcoder.encode(batch.select(batch.position > 0).inputs) > 1e-3


def _short_cut(graph: AttributionGraph) -> float:
    """Share of features' direct effects on the answer that come from the first layer."""
    effects = graph.to_dense()[graph.first_target, : graph.n_features].abs()
    total = float(effects.sum())
    return float(effects[graph.features[:, 0] == 0].sum()) / total if total else 0.0
