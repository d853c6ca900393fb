"""How a transcoder is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from clt.config.base import Config, require_one_of, require_positive
from clt.config.clt_config import NormalizationMethod
from clt.errors import ConfigError

# What an interrupted run may be gone on with differently: where the data lie (their values are checked), what is
# reported and saved, how long one session lasts, and where the optimiser's state lives.
BOOKKEEPING = frozenset(
    {
        *("activation_source", "activation_path", "remote_config", "server_url", "dataset_id"),
        *("remote_timeout", "remote_max_retries", "remote_prefetch_batches"),
        *("log_interval", "eval_interval", "eval_batches"),
        *("fidelity_interval", "fidelity_model", "fidelity_dataset", "fidelity_samples", "fidelity_new_tokens"),
        *("checkpoint_interval", "keep_checkpoints", "milestone_interval", "async_save", "write_final_folder"),
        *("time_limit_minutes", "skip_nonfinite_steps", "debug_anomaly", "offload_optimizer"),
        *("enable_wandb", "wandb_project", "wandb_entity", "wandb_run_name", "wandb_tags"),
        *("enable_trackio", "trackio_project"),
    }
)
_REMOTE = ("server_url", "dataset_id", "remote_timeout", "remote_max_retries", "remote_prefetch_batches")
# Fields of crosslayer-coding's TrainingConfig that nothing read, or that only printed.
_WITHOUT_EFFECT = frozenset(
    {
        *("n_batches_in_buffer", "normalization_estimation_batches", "optimizer_states_dtype"),
        *("enable_stochastic_rounding", "diag_every_n_eval_steps", "max_features_for_diag_hist"),
        *("compute_sparsity_diagnostics", "enable_profiling", "jumprelu_default_theta_on_convert"),
        *("fp16_convert_weights", "lr_scheduler_params"),
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Data, losses, schedules, optimiser and bookkeeping of one run."""

    training_steps: int = 50_000
    """Optimiser steps."""
    train_batch_size_tokens: int = 4096
    """Tokens per step."""
    micro_batch_tokens: int | None = None
    """Tokens per forward and backward; gradients add up to the full batch's. batchtopk chooses per micro-batch."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the computation; master weights, thresholds and the optimiser stay in the type of the parameters."""
    route: Literal["auto", "dense", "sparse", "plain"] = "auto"
    """How a step is computed, with the same result: by products, by gathers (auto: by density), or by autograd."""
    recompute_encoder: bool = False
    """relu, jumprelu: compute pre-activations again in backward instead of keeping them for all layers."""
    optimizer_in_backward: bool = False
    """Update each layer's weights as soon as its gradient is there, which is then freed; needs no gradient clipping."""
    torch_compile: bool = False
    """Compile forward and losses with torch.compile."""
    learning_rate: float | None = None
    """Peak learning rate; None: 2e-4 / sqrt(features per layer / 2^14)."""
    lr_scheduler: Literal["constant", "linear", "cosine", "linear_final20"] = "linear_final20"
    """Shape of the learning rate after warm-up; linear_final20 is flat, then falls to zero over the last fifth."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    optimizer: Literal["adam", "adamw", "adamw8bit"] = "adam"
    """Adam, Adam with decoupled weight decay on the matrices, or the latter with 8-bit moments (needs torchao)."""
    optimizer_state: Literal["fp32", "bf16"] = "fp32"
    """Type of adam's and adamw's moments; bf16, rounded at random, takes 4 instead of 8 bytes per weight."""
    offload_optimizer: bool = False
    """Keep moments, and fp32 weights where parameters are in half precision, in the host's memory (adam, adamw)."""
    optimizer_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    optimizer_beta2: float = 0.999
    """Decay of the gradient's running square."""
    weight_decay: float = 0.0
    """AdamW's weight decay; never applied to biases or thresholds."""
    gradient_clip_val: float | None = 1.0
    """Largest allowed norm of the whole gradient; None: no limit."""
    ema_decay: float | None = None
    """Keep a running mean of the weights with this decay, and make it the result; None: the last weights are."""
    skip_nonfinite_steps: int = 0
    """How many steps with a NaN or an infinity are left out before the run stops; each names its layer and term."""
    time_limit_minutes: float | None = None
    """Write a checkpoint and stop after this long; the same command goes on."""
    debug_anomaly: bool = False
    """Let autograd name the operation that made a NaN (slow)."""
    seed: int = 42
    """Seed of the initial weights and of the order of the data."""
    activation_source: Literal["local_manifest", "remote"] = "local_manifest"
    """Where activations come from: a folder (`activation_path`) or a server (`server_url` and `dataset_id`)."""
    server_url: str | None = None
    """Address of an activation server, such as http://localhost:8000."""
    dataset_id: str | None = None
    """Data set on it, <model>/<corpus>_<split>."""
    remote_timeout: float = 120.0
    """Seconds until a request to it is given up and tried again."""
    remote_max_retries: int = 3
    """How often."""
    remote_prefetch_batches: int = 16
    """Batches fetched ahead."""
    remote_config: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """The same as a dictionary, as crosslayer-coding takes it: server_url, dataset_id, timeout."""
    activation_path: Annotated[str | None, tyro.conf.arg(aliases=("--data",))] = None
    """Folder that `clt generate` wrote (training split)."""
    sampling_strategy: Literal["mixed", "random_chunk", "sequential"] = "mixed"
    """Order of the rows: mixed across all shards, or shard by shard."""
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
    sparsity_target_l0: float | None = None
    """Raise the sparsity weight above its schedule until so many features per token and layer are on; None: don't."""
    sparsity_target_tokens: int = 16_384
    """jumprelu: at the end all thresholds are scaled by one factor that meets it on so many training tokens; 0: not."""
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
    """Steps over which k (or sparsity_target_l0) falls linearly from `k_anneal_start` times its value to it."""
    k_anneal_start: float = 4.0
    """How many times it the annealing starts from."""
    dead_feature_window: int = 100_000
    """Tokens without firing after which a feature counts as dead during training."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_interval: int = 1000
    """Steps between evaluations on held-out activations (if there are any)."""
    eval_batches: int = 8
    """Held-out batches per evaluation during training."""
    fidelity_interval: int | None = None
    """Steps between measurements of the host with the transcoder in place of its MLPs; None: never."""
    fidelity_dataset: str | None = None
    """Held-out samples for them, as `clt fidelity --dataset` takes them."""
    fidelity_model: str | None = None
    """Host for them, as `clt fidelity --model` takes it; None: the one that the activations are of."""
    fidelity_samples: int = 32
    """How many samples."""
    fidelity_new_tokens: int = 24
    """Length of the answers generated freely."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best (by held-out NMSE) and the milestones."""
    milestone_interval: int | None = None
    """Checkpoints at multiples of this many steps are kept for good."""
    async_save: bool = False
    """Write checkpoints beside the training steps, from a copy in the host's memory (as large as a checkpoint)."""
    write_final_folder: bool = True
    """Also write crosslayer-coding's `final/clt.pt` and `final/cfg.json` (the weights once more)."""
    enable_wandb: bool = False
    """Send the numbers to Weights & Biases (needs wandb)."""
    wandb_project: str = "clt"
    """Its project."""
    wandb_entity: str | None = None
    """Its user or team."""
    wandb_run_name: str | None = None
    """Its name of the run; None: the name of the run's folder."""
    wandb_tags: Sequence[str] = ()
    """Its tags."""
    enable_trackio: bool = False
    """Send the numbers to Trackio (needs trackio)."""
    trackio_project: str = "clt"
    """Its project."""

    def __post_init__(self) -> None:
        owner = "TrainingConfig"
        require_positive(
            owner,
            training_steps=self.training_steps,
            train_batch_size_tokens=self.train_batch_size_tokens,
            micro_batch_tokens=self.micro_batch_tokens,
            time_limit_minutes=self.time_limit_minutes,
            milestone_interval=self.milestone_interval,
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
            sparsity_target_l0=self.sparsity_target_l0,
        )
        require_one_of(owner, "precision", self.precision, ("fp32", "bf16", "fp16"))
        require_one_of(owner, "optimizer", self.optimizer, ("adam", "adamw", "adamw8bit"))
        require_one_of(owner, "optimizer_state", self.optimizer_state, ("fp32", "bf16"))
        self._require_8_bits_alone()
        require_one_of(owner, "loss_normalisation", self.loss_normalisation, ("variance", "none"))
        require_one_of(owner, "lr_scheduler", self.lr_scheduler, ("constant", "linear", "cosine", "linear_final20"))
        require_one_of(owner, "route", self.route, ("auto", "dense", "sparse", "plain"))
        if self.lr_warmup_steps >= self.training_steps and self.lr_warmup_steps > 0:
            raise ConfigError(
                f"{owner}.lr_warmup_steps = {self.lr_warmup_steps} leaves nothing of training_steps = "
                f"{self.training_steps}. Shorten the warm-up or train longer."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"{owner}.ema_decay = {self.ema_decay} must lie between 0 and 1 (for example 0.999).")
        for name in ("skip_nonfinite_steps", "sparsity_target_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{owner}.{name} = {getattr(self, name)} must be 0 or more.")
        self._require_samples()
        self._take_remote_config()
        object.__setattr__(self, "wandb_tags", tuple(self.wandb_tags))  # JSON gives a list

    def _require_8_bits_alone(self) -> None:
        """Moments in 8 bits have no other type and no other place."""
        if self.optimizer == "adamw8bit" and self.optimizer_state != "fp32":
            raise ConfigError(
                f"TrainingConfig.optimizer_state = {self.optimizer_state!r} does not go with optimizer = 'adamw8bit', "
                "whose moments have 8 bits. Choose one of the two: --optimizer adamw with bf16 moments, or 8-bit ones."
            )
        if self.optimizer == "adamw8bit" and self.offload_optimizer:
            raise ConfigError(
                "TrainingConfig.offload_optimizer does not go with optimizer = 'adamw8bit', which makes and updates "
                "its moments on the device. Use --optimizer adamw, with --optimizer-state bf16 for 4 bytes per weight."
            )

    def _require_samples(self) -> None:
        """Positive counts, and not an interval alone: it does not say what to measure on."""
        names = ("fidelity_interval", "fidelity_samples", "fidelity_new_tokens")
        require_positive("TrainingConfig", **{name: getattr(self, name) for name in names})
        if self.fidelity_interval is not None and self.fidelity_dataset is None:
            raise ConfigError(
                f"TrainingConfig.fidelity_interval = {self.fidelity_interval} needs samples to measure on. Give "
                "--fidelity-dataset FILE with text that is not trained on, or world:NAME."
            )

    def _take_remote_config(self) -> None:
        """Spread crosslayer-coding's dictionary over the fields it stands for, and ask for what a server needs."""
        given = {} if self.remote_config is None else self.remote_config
        fields = {"timeout": "remote_timeout", "max_retries": "remote_max_retries"}
        for name, value in given.items():
            name = fields.get(name, "remote_prefetch_batches" if name == "prefetch_batches" else name)
            require_one_of("TrainingConfig", "remote_config key", name, _REMOTE)
            object.__setattr__(self, name, value)
        if self.server_url is not None and self.activation_path is None:
            object.__setattr__(self, "activation_source", "remote")  # an address says it all
        if self.activation_source == "remote" and None in (self.server_url, self.dataset_id):
            raise ConfigError(
                "TrainingConfig.activation_source = 'remote' needs server_url and dataset_id (for example "
                "--server-url http://localhost:8000 --dataset-id gpt2/pile-uncopyrighted_train)."
            )

    @classmethod
    def migrate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read crosslayer-coding's files: None for a default, and fields that did nothing there either."""
        for name in ("optimizer_beta1", "optimizer_beta2", "wandb_project", "wandb_tags"):
            if values.get(name, 0) is None:
                del values[name]
        if values.get("lr_scheduler", 0) is None:
            values["lr_scheduler"] = "constant"
        return {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}

    def affecting_the_result(self) -> dict[str, Any]:
        """The options that decide the weights; the others may change when a run is gone on with."""
        return {name: value for name, value in self.to_dict().items() if name not in BOOKKEEPING}
