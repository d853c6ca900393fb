"""What a run starts from: the store its configuration names, and a transcoder fitted to the data's statistics."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch

from clt.config import CLTConfig, TrainingConfig
from clt.data.stores import (
    BaseActivationStore,
    LocalActivationStore,
    ManifestActivationStore,
    RemoteActivationStore,
)
from clt.errors import ConfigError
from clt.models import ActivationStatistics, CrossLayerTranscoder
from clt.parallel.feature_shard import Shards, shard_config
from clt.parallel.mesh import Mesh
from clt.training.losses import pays_sparsity
from clt.types import ActivationBatch

# Tokens from which the encoder biases are set before training.
_BIAS_TOKENS = 8192
# A feature starts by firing on 10,000 / (all features) of the tokens (Anthropic, January 2025), within these bounds:
# small dictionaries would otherwise start with every feature on everywhere.
_FIRING_TOKENS, _FIRING_BOUNDS = 10_000, (1e-4, 0.05)


def open_store(config: TrainingConfig, server_token: str | None = None) -> BaseActivationStore:
    """The activations that a configuration names.

    Args:
        config: says where they are.
        server_token: of the server; None: from the environment. Not part of the configuration, which is saved.

    Raises:
        ConfigError: it names none.
        DatasetError: they cannot be read.
    """
    shared: dict[str, Any] = {
        "batch_size_tokens": config.train_batch_size_tokens,
        "seed": config.seed,
        "dtype": getattr(torch, config.activation_dtype),
        "sampling_strategy": config.sampling_strategy,
    }
    if config.activation_source == "remote":
        return RemoteActivationStore(
            config.server_url or "",
            config.dataset_id or "",
            token=server_token,
            timeout_seconds=config.remote_timeout,
            max_retries=config.remote_max_retries,
            prefetch_batches=config.remote_prefetch_batches,
            **shared,
        )
    if config.activation_path is None:
        raise ConfigError(
            "TrainingConfig.activation_path is not set and no store was given. "
            "Point it at a folder that `clt generate` wrote, for example .../train."
        )
    return LocalActivationStore(config.activation_path, **shared)


def origin_of(store: BaseActivationStore) -> dict[str, Any]:
    """Which host the activations are of and where in it they were taken, as fields of `CLTConfig`; what is known."""
    if not isinstance(store, ManifestActivationStore):
        return {}
    info = store.metadata.info
    templates = {
        "mlp_input_template": _template([(point.layer, point.input_path) for point in info.hookpoints]),
        "mlp_output_template": _template([(point.layer, point.output_path) for point in info.hookpoints]),
    }
    return {"model_name": info.model_name, **{name: path for name, path in templates.items() if path is not None}}


def _template(paths: Sequence[tuple[int, str]]) -> str | None:
    """The module path with {} for the layer; None if the paths do not follow one."""
    for layer, path in paths[:1]:
        template = re.sub(rf"(?<=\.){layer}(?=\.)", "{}", path, count=1)
        if "{}" in template and all(template.format(each) == other for each, other in paths):
            return template
    return None


def require_same_shape(config: CLTConfig, store: BaseActivationStore) -> None:
    """Refuse data with another number of layers or dimensions than the transcoder.

    Raises:
        ConfigError: naming both values.
    """
    for name, ours, data in (
        ("num_layers", config.num_layers, store.n_layers),
        ("d_model", config.d_model, store.d_model),
    ):
        if ours != data:
            raise ConfigError(
                f"CLTConfig.{name} = {ours}, but the activations have {name} = {data}. They were probably "
                f"captured from another host. Set {name} = {data} or capture again."
            )


def require_measure(training: TrainingConfig, measure: object) -> None:
    """Refuse an interval without something to measure, and the other way round.

    Raises:
        ConfigError: saying which is missing.
    """
    if training.fidelity_interval is not None and measure is None:
        raise ConfigError(
            f"TrainingConfig.fidelity_interval = {training.fidelity_interval}, but nothing was given to measure with. "
            "`clt train` opens the host itself; in Python, give CLTTrainer(..., fidelity=FidelityProbe(...))."
        )
    if training.fidelity_interval is None and measure is not None:
        raise ConfigError(
            "CLTTrainer was given `fidelity`, but TrainingConfig.fidelity_interval does not say how often."
        )


def require_penalty(config: CLTConfig, training: TrainingConfig) -> None:
    """Refuse to steer a sparsity weight that nothing is multiplied by.

    Raises:
        ConfigError: naming the family and the weight.
    """
    if training.sparsity_target_l0 is not None and not pays_sparsity(config, training):
        raise ConfigError(
            f"sparsity_target_l0 = {training.sparsity_target_l0} steers the sparsity penalty, but there is none with "
            f"activation_fn = {config.activation_fn!r} and sparsity_lambda = {training.sparsity_lambda}. Use relu or "
            "jumprelu with a sparsity_lambda above 0; topk and batchtopk take their L0 as topk_k and batchtopk_k."
        )


def require_parallel(training: TrainingConfig, mesh: Mesh) -> None:
    """Refuse what several ranks cannot do together.

    Raises:
        ConfigError: naming the option and why.
    """
    if mesh.is_alone:
        return
    if training.fidelity_interval is not None:
        raise ConfigError(
            f"TrainingConfig.fidelity_interval = {training.fidelity_interval} puts a transcoder into its host; "
            f"none of {mesh.size} ranks holds all of it. Leave it out, and measure checkpoints with `clt fidelity`."
        )
    for name, odd, why in (
        ("precision", "fp16", "whose loss scale each rank would set on its own; use bf16"),
        ("optimizer", "adamw8bit", "whose blocks of quantised moments cannot be cut into slices; use adamw"),
        ("optimizer_state", "bf16", "whose rounding each rank would draw on its own; use fp32"),
        ("optimizer_in_backward", True, "which takes a step before the ranks have added up their gradients"),
        ("torch_compile", True, "which cannot compile what ranks tell each other"),
    ):
        if getattr(training, name) == odd:
            raise ConfigError(f"TrainingConfig.{name} = {odd!r} does not work on {mesh.size} ranks: {why}.")


def build_model(config: CLTConfig, store: BaseActivationStore, mesh: Mesh, seed: int) -> CrossLayerTranscoder:
    """A transcoder with random weights, the data's standardisation, and encoder biases that let every feature fire.

    Args:
        config: of the whole dictionary.
        store: of whole batches.
        mesh: says which features are this rank's.
        seed: of the weights, which are the same for any number of ranks.
    """
    device = mesh.device
    if mesh.is_alone:
        model = CrossLayerTranscoder(config, device=device, seed=seed)
    else:
        here = shard_config(config, mesh.tp.rank, mesh.tp.size)
        model = CrossLayerTranscoder(here, device=device, seed=seed, peers=Shards(config, mesh))
    sides = store.statistics.inputs, store.statistics.targets
    values = [part.float().to(device) for side in sides for part in (side.mean, side.std)]
    model.fit_standardisation(ActivationStatistics(*values))
    batch = first_tokens(store, _BIAS_TOKENS).to(device)
    total = config.num_features * config.num_layers
    low, high = _FIRING_BOUNDS
    model.fit_encoder_bias(batch.inputs, min(max(_FIRING_TOKENS / total, low), high))
    return model


def first_tokens(store: BaseActivationStore, n_tokens: int) -> ActivationBatch:
    """The next few batches of a store, which is then put back to where it was."""
    state = store.state_dict()
    batches: list[ActivationBatch] = []
    while sum(batch.n_tokens for batch in batches) < n_tokens:
        batches.append(next(store))
    store.load_state_dict(state)
    return ActivationBatch(
        inputs=torch.cat([batch.inputs for batch in batches], 1),
        targets=torch.cat([batch.targets for batch in batches], 1),
        kind=torch.cat([batch.kind for batch in batches]),
        sample=torch.cat([batch.sample for batch in batches]),
        position=torch.cat([batch.position for batch in batches]),
    )


def data_fingerprint(store: BaseActivationStore) -> str:
    """A short name for the values of a data set: a hash of its statistics."""
    digest = hashlib.sha256()
    for side in (store.statistics.inputs, store.statistics.targets):
        for part in (side.mean, side.std):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
