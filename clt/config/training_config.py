"""How a transcoder is trained."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from clt.config.base import Config, require_one_of, require_positive
from clt.config.clt_config import NormalizationMethod
from clt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Data, losses, schedules, optimiser and bookkeeping of one run."""

    training_steps: int = 50_000
    """Optimiser steps."""
    train_batch_size_tokens: int = 4096
    """Tokens per step."""
    learning_rate: float | None = None
    """Peak learning rate; None: 2e-4 / sqrt(features per layer / 2^14)."""
    lr_scheduler: Literal["constant", "linear", "cosine", "linear_final20"] = "linear_final20"
    """Shape of the learning rate after warm-up; linear_final20 is flat, then falls to zero over the last fifth."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or Adam with decoupled weight decay on the matrices."""
    optimizer_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    optimizer_beta2: float = 0.999
    """Decay of the gradient's running square."""
    weight_decay: float = 0.0
    """AdamW's weight decay; never applied to biases or thresholds."""
    gradient_clip_val: float | None = 1.0
    """Largest allowed norm of the whole gradient; None: no limit."""
    seed: int = 42
    """Seed of the initial weights and of the order of the data."""
    activation_source: Literal["local_manifest"] = "local_manifest"
    """Where activations come from."""
    activation_path: Annotated[str | None, tyro.conf.arg(aliases=("--data",))] = None
    """Folder that `clt generate` wrote (training split)."""
    activation_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type in which activations arrive from the store."""
    normalization_method: Annotated[NormalizationMethod | None, tyro.conf.Suppress] = None
    """Overrides CLTConfig.normalization_method; where crosslayer-coding's snippets set it."""
    loss_normalisation: Literal["variance", "none"] = "variance"
    """Divide each target's squared error by that target's variance, or sum the raw errors as the seeds do."""
    sparsity_lambda: float = 1e-3
    """Final weight of the sparsity penalty (relu, jumprelu and, if asked for, batchtopk)."""
    sparsity_lambda_schedule: Literal["linear", "delayed_linear", "constant"] = "linear"
    """How the weight grows: from zero over the whole run, after a delay, or not at all."""
    sparsity_lambda_delay_frac: float = 0.1
    """Share of the run before delayed_linear starts."""
    sparsity_c: float = 4.0
    """Steepness of the tanh in the sparsity penalty (4 in Anthropic's January 2025 update, 1 in the seeds)."""
    sparsity_reduction: Literal["mean_tokens", "sum_tokens"] = "mean_tokens"
    """Mean over tokens, or crosslayer-coding's sum (which grows with the batch)."""
    sparsity_span_penalty: float = 0.0
    """Extra sparsity weight per layer of distance, for every target a feature clearly writes to; 0: off."""
    apply_sparsity_penalty_to_batchtopk: bool = False
    """Also charge batchtopk features the sparsity penalty."""
    preactivation_coef: float = 3e-6
    """Weight of the pre-activation penalty, which pulls silent features back towards their threshold."""
    preactivation_form: Literal["threshold", "negative"] = "threshold"
    """relu(theta - h) * decoder norm (Anthropic, January 2025) or the seeds' mean of relu(-h)."""
    aux_loss_factor: float | None = 1 / 32
    """Weight of AuxK: dead features reconstruct what the living ones leave over (topk and batchtopk); None: off."""
    aux_k: int | None = None
    """Dead features used per token and layer by AuxK; None: half of d_model, at most 512."""
    k_anneal_steps: int = 0
    """Steps over which topk's and batchtopk's k falls linearly from `k_anneal_start` times k to k."""
    k_anneal_start: float = 4.0
    """How many times k the annealing starts from."""
    dead_feature_window: int = 100_000
    """Tokens without firing after which a feature counts as dead during training."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_interval: int = 1000
    """Steps between evaluations on held-out activations (if there are any)."""
    eval_batches: int = 8
    """Held-out batches per evaluation during training."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""

    def __post_init__(self) -> None:
        owner = "TrainingConfig"
        require_positive(
            owner,
            training_steps=self.training_steps,
            train_batch_size_tokens=self.train_batch_size_tokens,
            learning_rate=self.learning_rate,
            gradient_clip_val=self.gradient_clip_val,
            aux_loss_factor=self.aux_loss_factor,
            aux_k=self.aux_k,
            dead_feature_window=self.dead_feature_window,
            log_interval=self.log_interval,
            eval_interval=self.eval_interval,
            checkpoint_interval=self.checkpoint_interval,
            keep_checkpoints=self.keep_checkpoints,
            sparsity_c=self.sparsity_c,
        )
        require_one_of(owner, "loss_normalisation", self.loss_normalisation, ("variance", "none"))
        require_one_of(owner, "lr_scheduler", self.lr_scheduler, ("constant", "linear", "cosine", "linear_final20"))
        if self.lr_warmup_steps >= self.training_steps and self.lr_warmup_steps > 0:
            raise ConfigError(
                f"{owner}.lr_warmup_steps = {self.lr_warmup_steps} leaves nothing of training_steps = "
                f"{self.training_steps}. Shorten the warm-up or train longer."
            )

    @classmethod
    def migrate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read the optional betas of crosslayer-coding, where None means Adam's default."""
        for name in ("optimizer_beta1", "optimizer_beta2"):
            if values.get(name, 0) is None:
                del values[name]
        return values
