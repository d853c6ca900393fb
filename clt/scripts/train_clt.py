r"""crosslayer-coding's `train_clt.py`: its flags and its defaults, on this project's trainer.

    python scripts/train_clt.py --activation-source local_manifest --model-name gpt2 --num-features 3072 \
        --activation-path ./tutorial_activations/gpt2/pile-uncopyrighted_train --output-dir ./clt_output_local

`clt train` is the same with our defaults and more choices. Differences that no flag expresses: losses are means over
tokens and divided by each layer's variance, held-out activations are used when they lie beside the training data, and a
run goes through the data as often as its steps need.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.parallel.mesh import is_launched
from clt.scripts import train
from clt.training.setup import open_store


@dataclass(frozen=True, kw_only=True)
class Options:
    """The seed's flags."""

    activation_source: Literal["local_manifest", "remote"]
    """Where activations come from."""
    model_name: str
    """The host. Layers and width come from the data, so nothing is downloaded."""
    num_features: int
    """Features per layer."""
    output_dir: str | None = None
    """Folder of the run; None: clt_train_<time>."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""
    distributed: bool = False
    """Train on several processes; not part of this launcher."""
    resume_from_checkpoint_dir: str | None = None
    """Go on with the run in this folder."""
    resume_step: int | None = None
    """From the checkpoint of this step; None: the newest."""

    activation_path: str | None = None
    """Folder of activations (local_manifest)."""
    server_url: str | None = None
    """Address of the activation server (remote)."""
    dataset_id: str | None = None
    """Data set on it (remote)."""
    remote_timeout: float = 120.0
    """Seconds per request."""
    remote_max_retries: int = 3
    """How often a request is tried again."""
    remote_prefetch_batches: int = 16
    """Batches fetched ahead."""
    sampling_strategy: Literal["sequential", "random_chunk", "mixed"] = "sequential"
    """Order of the rows."""
    activation_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which activations arrive."""
    normalization_method: Literal["auto", "mean_std", "estimated_mean_std", "sqrt_d_model", "none"] = "mean_std"
    """Standardisation of the activations."""

    activation_fn: Literal["jumprelu", "relu", "batchtopk", "topk"] = "jumprelu"
    """How pre-activations become activations."""
    jumprelu_threshold: float = 0.03
    """Where thresholds start."""
    batchtopk_k: float | None = None
    """Features kept per token, on average and over all layers."""
    batchtopk_frac: float | None = None
    """The same as a share of all features (the seed ignored it)."""
    topk_k: float | None = None
    """Features kept per token; below 1, a share of all."""
    topk_mode: Literal["global", "per_layer"] = "global"
    """Whether topk chooses over all layers together or within each."""
    disable_batchtopk_straight_through: bool = False
    """No effect, in the seed as here."""
    disable_topk_straight_through: bool = False
    """No effect, in the seed as here."""
    clt_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the parameters."""
    decoder_tying: Literal["none", "per_source", "per_target"] = "none"
    """Which decoders are shared."""
    enable_feature_offset: bool = False
    """Learned offsets of tied decoders."""
    enable_feature_scale: bool = False
    """Learned scales of tied decoders."""
    skip_connection: bool = False
    """Linear path beside the features."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    training_steps: int = 50_000
    """Optimiser steps."""
    train_batch_size_tokens: int = 4096
    """Tokens per step."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the computation."""
    fp16_convert_weights: bool = False
    """No effect: master weights stay as --clt-dtype says."""
    debug_anomaly: bool = False
    """Let autograd name the operation that made a NaN."""
    sparsity_lambda: float = 1e-3
    """Final weight of the sparsity penalty."""
    sparsity_lambda_schedule: Literal["linear", "delayed_linear"] = "linear"
    """How it grows."""
    sparsity_lambda_delay_frac: float = 0.1
    """Share of the run before delayed_linear starts."""
    sparsity_c: float = 1.0
    """Steepness of the tanh."""
    preactivation_coef: float = 3e-6
    """Weight of the pre-activation penalty."""
    aux_loss_factor: float | None = None
    """Weight of the auxiliary loss."""
    apply_sparsity_penalty_to_batchtopk: bool = True
    """Also charge batchtopk features."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """Optimiser."""
    optimizer_beta1: float | None = None
    """Decay of the gradient's mean; None: 0.9."""
    optimizer_beta2: float | None = None
    """Decay of the gradient's square; None: 0.999."""
    lr_scheduler: Literal["linear", "cosine", "linear_final20", "none"] = "linear"
    """Shape of the learning rate."""
    gradient_clip_val: float | None = None
    """Largest norm of the gradient."""
    seed: int = 42
    """Seed of the weights and of the order."""
    dead_feature_window: int = 1000
    """Steps without firing after which a feature counts as dead."""
    compute_sparsity_diagnostics: bool = False
    """No effect: metrics.jsonl and `clt evaluate` have the numbers."""
    enable_profiling: bool = False
    """No effect: metrics.jsonl has tokens per second."""
    log_interval: int = 100
    """Steps between lines of metrics.jsonl."""
    eval_interval: int = 1000
    """Steps between evaluations on held-out activations."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints."""
    enable_wandb: bool = False
    """Send the numbers to Weights & Biases."""
    wandb_project: str | None = None
    """Its project."""
    wandb_entity: str | None = None
    """Its user or team."""
    wandb_run_name: str | None = None
    """Its name of the run."""
    wandb_tags: tuple[str, ...] = ()
    """Its tags."""


# Flags that do nothing here: what to say when one is given.
_DEAD = {
    "disable_batchtopk_straight_through": "gradients flow through kept features, exactly, with either value",
    "disable_topk_straight_through": "gradients flow through kept features, exactly, with either value",
    "fp16_convert_weights": "the weights' type is --clt-dtype; --precision fp16 computes in fp16",
    "compute_sparsity_diagnostics": "no diagnostics are printed; metrics.jsonl and `clt evaluate` have the numbers",
    "enable_profiling": "nothing is profiled; metrics.jsonl has tokens_per_second",
}
_SAME = (
    "activation_source activation_path server_url dataset_id remote_timeout remote_max_retries remote_prefetch_batches "
    "sampling_strategy activation_dtype learning_rate training_steps train_batch_size_tokens precision debug_anomaly "
    "sparsity_lambda sparsity_lambda_schedule sparsity_lambda_delay_frac sparsity_c preactivation_coef aux_loss_factor "
    "apply_sparsity_penalty_to_batchtopk optimizer optimizer_beta1 optimizer_beta2 gradient_clip_val seed log_interval "
    "eval_interval checkpoint_interval enable_wandb wandb_project wandb_entity wandb_run_name wandb_tags"
)


def training_config(options: Options) -> TrainingConfig:
    """The seed's training flags as ours; its dead-feature window counts steps, ours tokens."""
    values = {name: getattr(options, name) for name in _SAME.split()}
    values["lr_scheduler"] = "constant" if options.lr_scheduler == "none" else options.lr_scheduler
    values["dead_feature_window"] = options.dead_feature_window * options.train_batch_size_tokens
    values["weight_decay"] = 0.01 if options.optimizer == "adamw" else 0.0  # torch's default, which the seed took
    return TrainingConfig.from_dict(values)


def clt_config(options: Options) -> CLTConfig:
    """The seed's model flags as ours; layers and width are put in when the data are open."""
    values: dict[str, Any] = {
        "num_features": options.num_features,
        "num_layers": train.UNKNOWN_LAYERS,
        "d_model": train.UNKNOWN_WIDTH,
        "model_name": options.model_name,
        "activation_fn": options.activation_fn,
        "jumprelu_threshold": options.jumprelu_threshold,
        "topk_mode": options.topk_mode,
        "normalization_method": options.normalization_method,
        "clt_dtype": options.clt_dtype,
    }
    k = options.topk_k
    values["topk_k"] = int(k) if k is not None and k >= 1 else k
    values["batchtopk_k"] = options.batchtopk_k
    for name, off in (
        ("decoder_tying", "none"),
        ("enable_feature_offset", False),
        ("enable_feature_scale", False),
        ("skip_connection", False),
    ):
        if getattr(options, name) != off:
            values[name] = getattr(options, name)
    return CLTConfig.from_dict(values)


def _fill_in_share(options: Options) -> Options:
    """--batchtopk-frac as the --batchtopk-k it stands for; the number of layers is read from the data."""
    if options.batchtopk_frac is None:
        return options
    if options.batchtopk_k is not None:
        raise ConfigError("--batchtopk-frac and --batchtopk-k say the same thing. Give one of them.")
    layers = open_store(training_config(options)).n_layers
    return replace(options, batchtopk_k=options.batchtopk_frac * options.num_features * layers)


def _check_ranks(options: Options) -> None:
    """Ranks are torchrun's to start; they must be told one folder, since each would take the time of its own start."""
    if options.distributed and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "--distributed, but nothing started several ranks (WORLD_SIZE is not set). "
            "Start them: torchrun --nproc-per-node N scripts/train_clt.py ... --distributed; or leave the flag out."
        )
    if is_launched() and options.output_dir is None and options.resume_from_checkpoint_dir is None:
        raise ConfigError(f"{os.environ['WORLD_SIZE']} ranks need one folder for the run: give --output-dir.")


def main(options: Options) -> None:
    """Train as `clt train` does, and say which flags did nothing."""
    for name, why in _DEAD.items():
        if getattr(options, name):
            sys.stderr.write(f"note: --{name.replace('_', '-')} has no effect: {why}.\n")
    _check_ranks(options)
    resume = options.resume_from_checkpoint_dir
    if resume is not None:
        train.main(train.Options(resume=resume, resume_step=options.resume_step, device=options.device))
        return
    options = _fill_in_share(options)
    output = options.output_dir or f"clt_train_{int(time.time())}"
    parts = {"clt": clt_config(options), "training": training_config(options)}
    train.main(train.Options(output_dir=output, device=options.device, **parts))
