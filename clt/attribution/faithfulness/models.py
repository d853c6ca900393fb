"""Transcoders for the embedded worlds, trained in seconds from the host's activations in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from clt import worlds
from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.lm import ModelAdapter
from clt.models import ActivationStatistics, CrossLayerTranscoder
from clt.replacement import ReplacementModel
from clt.training.step import Engine
from clt.types import ActivationBatch, Sample

WINDOWS: dict[str, int | None] = {"clt": None, "plt": 1}
"""Targets per feature: all later layers too, or its own alone."""
_BATCH = 1024
_FEATURES_PER_WIDTH, _K = 8, 8


def fit(batch: ActivationBatch, config: CLTConfig, steps: int, seed: int = 0) -> CrossLayerTranscoder:
    """Train on activations that fit into memory, random tokens per step."""
    training = TrainingConfig(
        training_steps=steps,
        train_batch_size_tokens=_BATCH,
        learning_rate=6e-3,
        aux_loss_factor=1.0,
        dead_feature_window=3 * _BATCH,
    )
    model = CrossLayerTranscoder(config, seed=seed)
    model.fit_standardisation(
        ActivationStatistics(*(part for side in (batch.inputs, batch.targets) for part in (side.mean(1), side.std(1))))
    )
    engine, rng = Engine(model, training), torch.Generator().manual_seed(seed)
    silent = torch.zeros(config.num_layers, config.num_features)
    for step in range(steps):
        rows = torch.randint(0, batch.n_tokens, (_BATCH,), generator=rng)
        result = engine.step(batch.select(rows), step, silent >= training.dead_feature_window)
        silent = torch.where(result.fired > 0, 0, silent + _BATCH)
    return model.requires_grad_(False).eval()


def captured(adapter: ModelAdapter, samples: list[Sample], batch_size: int = 64) -> ActivationBatch:
    """What the host's MLPs read and write on samples with their answers; first positions left out."""
    parts = [
        adapter.capture(adapter.prepare(samples[start : start + batch_size]))
        for start in range(0, len(samples), batch_size)
    ]
    whole = ActivationBatch(
        inputs=torch.cat([part.inputs for part in parts], 1),
        targets=torch.cat([part.targets for part in parts], 1),
        kind=torch.cat([part.kind for part in parts]),
        sample=torch.cat([part.sample for part in parts]),
        position=torch.cat([part.position for part in parts]),
    )
    return whole.select(whole.position > 0)


def world_model(name: str, kind: str = "clt", *, steps: int = 600, folder: Path | None = None) -> ReplacementModel:
    """A world's host with a transcoder trained on its training text; kept in `folder` and opened from there next time.

    Raises:
        ConfigError: the world has no host.
    """
    world = worlds.load(name)
    if not isinstance(world, worlds.HostedWorld):
        raise ConfigError(f"The {name} world has no host to attribute. two-hop and shapes have.")
    adapter = ModelAdapter.from_pretrained(world.host_path(), device="cpu")
    place = (folder or Path("runs") / "worlds") / f"{name}-{kind}-{steps}"
    if (place / "cfg.json").exists():
        return ReplacementModel(adapter, CrossLayerTranscoder.from_pretrained(place))
    batch = captured(adapter, world.samples("train", 2000))
    config = CLTConfig(
        num_features=_FEATURES_PER_WIDTH * adapter.d_model,
        num_layers=adapter.n_layers,
        d_model=adapter.d_model,
        n_targets=WINDOWS[kind],
        activation_fn="topk",
        topk_k=_K,
        model_name=f"world:{name}",
        mlp_input_template=adapter.input_template,
        mlp_output_template=adapter.output_template,
    )
    transcoder = fit(batch, config, steps)
    transcoder.save_pretrained(place)
    return ReplacementModel(adapter, transcoder)


def world_prompt(name: str) -> Sample:
    """The first held-out question of a world."""
    world = worlds.load(name)
    if not isinstance(world, worlds.HostedWorld):
        raise ConfigError(f"The {name} world has no questions. two-hop and shapes have.")
    return world.questions("held_out", 1)[0]
