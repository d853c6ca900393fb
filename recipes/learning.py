"""Does training find features that are known to be there? One short run per family on the features world.

The world switches on four of 64 features per layer and token; each writes its own vector to its layer's MLP output and
to every later one. A transcoder has as many features as the world.

Run: python recipes/learning.py --output learning.json
Found are true features whose decoder, over all the layers it writes to, has a cosine above 0.9 with that of one of the
transcoder's features; dead are features that fire on none of the held-out tokens.
"""

from __future__ import annotations

import ast
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from clt.config import CLTConfig, TrainingConfig
from clt.data.streaming import StreamingActivationStore
from clt.models import CrossLayerTranscoder
from clt.training.trainer import CLTTrainer
from clt.types import ActivationBatch
from clt.worlds.features import FeaturesWorld, TrueFeatures

# Activations are a few units here, where tanh with the default steepness of 4 is flat and moves nothing any more.
_PENALTY = {"sparsity_lambda": 0.1, "sparsity_c": 0.3}
# Here few features are dead at a time, so the pull that brings them back may be strong.
_PULL = {"preactivation_coef": 1e-2, "dead_feature_window": 3_000}
_PULL_AND_AUX = {**_PULL, "aux_loss_factor": 1.0}
# Four features per layer and token on average. Top-k keeps a fixed number of them: with five, its L0 stays below four.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relu": ({"activation_fn": "relu"}, _PENALTY),
    "jumprelu": ({"activation_fn": "jumprelu"}, _PENALTY),
    "topk, 5 per layer": ({"activation_fn": "topk", "topk_k": 5}, _PULL),
    "topk, 16 over all layers": ({"activation_fn": "topk", "topk_k": 16, "topk_mode": "global"}, _PULL),
    "batchtopk, 4 per layer": (
        {"activation_fn": "batchtopk", "batchtopk_k": 4, "batchtopk_mode": "per_layer"},
        _PULL_AND_AUX,
    ),
    "batchtopk, 16 over all layers": ({"activation_fn": "batchtopk", "batchtopk_k": 16}, _PULL_AND_AUX),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long, and which."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Which of the families."""
    steps: int = 2000
    """Optimiser steps."""
    batch_tokens: int = 1024
    """Tokens per step; all of them new."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    change: tuple[str, ...] = ()
    """NAME=VALUE of any other option of the transcoder or the training, for trying things out."""
    expansion: float = 1.0
    """Features per true feature."""
    held_out_tokens: int = 20_000
    """For the numbers."""
    seed: int = 0
    """Of the world and of the weights."""
    output: Path | None = None
    """JSON for the numbers."""


def store_of(world: FeaturesWorld, batch_tokens: int) -> StreamingActivationStore:
    """New tokens of the world without end."""

    def source(epoch: int) -> Iterator[ActivationBatch]:
        return (world.activations("train", batch_tokens, seed=number).batch for number in count())

    return StreamingActivationStore(
        source, batch_size_tokens=batch_tokens, buffer_tokens=batch_tokens, statistics_tokens=20_000
    )


def best_cosines(model: CrossLayerTranscoder, truth: TrueFeatures) -> Float[Tensor, " feature"]:
    """For every true feature, the largest cosine of its decoder with that of a feature of the same layer."""
    best = []
    for source in range(model.config.num_layers):
        targets = model.config.targets_of(source)
        learned = torch.cat([model.decoder(source, target) for target in targets], 1)
        true = truth.decoder[targets.start : targets.stop, truth.layer == source].transpose(0, 1).flatten(1)
        cosine = torch.nn.functional.normalize(true, dim=1) @ torch.nn.functional.normalize(learned, dim=1).T
        best.append(cosine.amax(1))
    return torch.cat(best)


def learn(family: str, options: Options) -> dict[str, Any]:
    """Train one family and measure it."""
    world = FeaturesWorld(n_features=256, density=4 / 64, seed=options.seed)
    shape, training = FAMILIES[family]
    training = {"dead_feature_window": 20_000, **training}
    changes = dict(each.split("=", 1) for each in options.change)
    changes = {name: ast.literal_eval(value) for name, value in changes.items()}
    shape = shape | {name: value for name, value in changes.items() if name in CLTConfig.__dataclass_fields__}
    training = training | {name: value for name, value in changes.items() if name not in shape}
    config = CLTConfig(
        num_features=round(options.expansion * world.n_features / world.n_layers),
        num_layers=world.n_layers,
        d_model=world.d_model,
        **shape,
    )
    held_out = world.activations("held_out", options.held_out_tokens)
    schedule = TrainingConfig(
        training_steps=options.steps,
        train_batch_size_tokens=options.batch_tokens,
        learning_rate=options.learning_rate,
        lr_warmup_steps=options.steps // 20,
        seed=options.seed,
        checkpoint_interval=options.steps,
        activation_dtype="float32",
        **training,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(world, options.batch_tokens)
        trainer = CLTTrainer(
            config, schedule, folder, store=store, held_out=lambda: iter([held_out.batch]), shows_progress=False
        )
        begin = time.perf_counter()
        model = trainer.train()
        measured = trainer.evaluate()
    cosine = best_cosines(model, world.features())
    return {
        "family": family,
        "nmse": measured.nmse,
        "l0": measured.l0,
        "true_l0": float((held_out.active > 0).sum(1).float().mean()) / world.n_layers,
        "recovered": float((cosine > 0.9).float().mean()),
        "dead": measured.dead_share,
        "seconds": time.perf_counter() - begin,
    }


def main(options: Options) -> None:
    """Train all, print a table, write JSON."""
    torch.set_num_threads(1)
    results = [learn(family, options) for family in options.families]
    print("| family | held-out NMSE | L0 (true) | recovered | dead | seconds |")
    print("|---|---|---|---|---|---|")
    for row in results:
        print(
            f"| {row['family']} | {row['nmse']:.4f} | {row['l0']:.2f} ({row['true_l0']:.2f}) | "
            f"{row['recovered']:.1%} | {row['dead']:.2%} | {row['seconds']:.0f} |"
        )
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
