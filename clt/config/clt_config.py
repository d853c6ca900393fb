"""What a cross-layer transcoder is: everything that is saved in `cfg.json` beside the weights."""

import math
from dataclasses import InitVar, dataclass
from typing import Annotated, Any, Literal, get_args

import tyro

from clt.config.base import Config, require_one_of, require_positive
from clt.errors import ConfigError

ActivationFn = Literal["relu", "jumprelu", "topk", "batchtopk"]
ScopeMode = Literal["per_layer", "global"]
DecoderTying = Literal["none", "per_source", "per_target"]
SkipConnection = Literal["none", "own", "all"]
NormalizationMethod = Literal["rms", "mean_std", "sqrt_d_model", "none", "auto", "estimated_mean_std"]

# crosslayer-coding's other names for mean_std. `auto` meant "mean_std if the data set has statistics"; ours always has.
_OLD_NORMALIZATION = {"auto": "mean_std", "estimated_mean_std": "mean_std"}
# Those it turns into sqrt_d_model when it reads a file of its first version.
_OLD_SQRT = ("auto_sqrt_d_model", "estimated_mean_std_sqrt_d_model")
# Fields that crosslayer-coding writes and nothing ever read.
_UNUSED_THERE = ("tl_input_template", "tl_output_template", "topk_straight_through", "batchtopk_straight_through")


@dataclass(frozen=True, kw_only=True)
class CLTConfig(Config):
    """Shape and non-linearity of a transcoder."""

    num_features: Annotated[int, tyro.conf.arg(aliases=("--features",))]
    """Features per layer."""
    num_layers: Annotated[int, tyro.conf.Suppress]
    """Layers of the host that are read and written."""
    d_model: Annotated[int, tyro.conf.Suppress]
    """Width of the host's residual stream."""
    model_name: str | None = None
    """The host, for reference."""
    first_target: int = 0
    """Distance from a feature's layer to the first MLP it writes to: 0 its own, 1 the next one."""
    n_targets: int | None = None
    """How many consecutive MLPs a feature writes to; None: up to the last. (0, 1) is a per-layer transcoder."""
    decoder_tying: DecoderTying = "none"
    """One decoder per (source, target); or per source, shared by its targets; or per target, shared by its sources."""
    decoder_rank: int | None = None
    """Untied only: rank of what distinguishes a feature's decoders from its nearest one; None: full matrices."""
    enable_feature_offset: bool = False
    """Add a learned number to each active feature before it is decoded, see `post_encoder`."""
    enable_feature_scale: bool = False
    """Multiply each active feature by a learned number before it is decoded, see `post_encoder`."""
    post_encoder: Literal["target", "pair"] = "target"
    """Feature offset and scale: one per target (crosslayer-coding), or one per (source, target) (EleutherAI)."""
    skip_connection: SkipConnection | bool = "none"
    """Linear path from what the MLP reads to `own` target or `all` in the window; True: all if untied, else own."""
    activation_fn: ActivationFn = "jumprelu"
    """How pre-activations become sparse activations."""
    jumprelu_threshold: float = 0.1
    """Threshold every JumpReLU feature starts from."""
    jumprelu_bandwidth: float = 2.0
    """Width of the window in which the threshold receives a straight-through gradient."""
    jumprelu_gradient: Literal["theta", "h"] = "theta"
    """Straight-through gradient of the threshold: -(theta/w), as in the paper, or crosslayer-coding's -(h/w)."""
    jumprelu_reach: Literal["threshold", "all"] = "threshold"
    """What the straight-through term trains: the threshold (Rajamanoharan et al.), or the encoder too (Anthropic)."""
    topk_k: float | None = None
    """Features kept per token: in each layer, or over all layers if `topk_mode` is global; below 1, a share of them."""
    topk_mode: ScopeMode = "per_layer"
    """Whether topk chooses within each layer or over all layers of a token together."""
    batchtopk_k: float | None = None
    """Features kept per token, on average over the batch: per layer, or in all if `batchtopk_mode` is global."""
    batchtopk_mode: ScopeMode = "global"
    """Whether batchtopk chooses within each layer or over all layers together."""
    ranking: Literal["norm", "value"] = "norm"
    """What topk and batchtopk rank by: activation times decoder norm, or the activation alone."""
    input_norm: Literal["none", "layer"] = "none"
    """Norm of each token before the encoder: none, or a layer norm without learned scale (vlm-clt-training's)."""
    normalization_method: NormalizationMethod = "rms"
    """Standardisation inside the transcoder: one scale per layer, mean and std per dimension, sqrt(d), or none."""
    clt_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Type of the parameters; None is float32. float64 is for checking one computation against another."""
    expected_input_dtype: str | None = None
    """Type the activations had in training, for reference."""
    mlp_input_template: str | None = None
    """Module path of what was read, with {} for the layer; for reference."""
    mlp_output_template: str | None = None
    """Module path of the MLP output, with {} for the layer; for reference."""
    topk_straight_through: InitVar[Annotated[bool, tyro.conf.Suppress]] = True
    """crosslayer-coding's, ignored: gradients flow through kept features, exactly, with either value there and here."""
    batchtopk_straight_through: InitVar[Annotated[bool, tyro.conf.Suppress]] = True
    """As topk_straight_through."""

    def __post_init__(self, topk_straight_through: bool, batchtopk_straight_through: bool) -> None:
        method = _OLD_NORMALIZATION.get(self.normalization_method, self.normalization_method)
        object.__setattr__(self, "normalization_method", method)
        if isinstance(self.skip_connection, bool):
            paths = "all" if self.decoder_tying == "none" else "own"
            object.__setattr__(self, "skip_connection", paths if self.skip_connection else "none")
        if self.topk_k is not None and self.topk_k == int(self.topk_k):
            object.__setattr__(self, "topk_k", int(self.topk_k))
        require_positive(
            "CLTConfig",
            num_features=self.num_features,
            num_layers=self.num_layers,
            d_model=self.d_model,
            n_targets=self.n_targets,
            jumprelu_threshold=self.jumprelu_threshold,
            jumprelu_bandwidth=self.jumprelu_bandwidth,
            topk_k=self.topk_k,
            batchtopk_k=self.batchtopk_k,
            decoder_rank=self.decoder_rank,
        )
        for name, allowed in _CHOICES.items():
            require_one_of("CLTConfig", name, getattr(self, name), allowed)
        if not 0 <= self.first_target < self.num_layers:
            raise ConfigError(
                f"CLTConfig.first_target = {self.first_target} leaves no target in a host of {self.num_layers} layers. "
                "Use 0 (own layer on) or 1 (later layers only)."
            )
        self._check_k()
        self._check_rank()

    @classmethod
    def migrate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read crosslayer-coding's `cfg.json`, of every version.

        There, topk chose over all layers unless told otherwise; offset and scale were ignored without tying; a
        `jumprelu_threshold` of 0 only marked a converted model, whose thresholds are among its weights; and
        `batchtopk_frac` was the share of all features that a token keeps.
        """
        if any(name in values for name in _UNUSED_THERE):
            values.setdefault("topk_mode", "global")
            if values.get("decoder_tying", "none") == "none":
                values.update(enable_feature_offset=False, enable_feature_scale=False)
        if values.get("jumprelu_threshold") == 0:
            del values["jumprelu_threshold"]
        if values.pop("sqrt_d_model_normalize", False) or values.get("normalization_method") in _OLD_SQRT:
            values["normalization_method"] = "sqrt_d_model"
        share = values.pop("batchtopk_frac", None)
        if share is not None and values.get("batchtopk_k") is None:
            values["batchtopk_k"] = share * values.get("num_features", 0) * values.get("num_layers", 0) or None
        return {name: value for name, value in values.items() if name not in _UNUSED_THERE}

    def _check_rank(self) -> None:
        """Low rank is itself a way of sharing decoders, so it takes no other."""
        if self.decoder_rank is None:
            return
        for name, off in (("decoder_tying", "none"), ("enable_feature_offset", False), ("enable_feature_scale", False)):
            if getattr(self, name) != off:
                raise ConfigError(
                    f"CLTConfig.decoder_rank = {self.decoder_rank} does not go with {name} = {getattr(self, name)!r}: "
                    "low-rank decoders already share one matrix per source and add what each target needs. "
                    f"Leave {name} = {off!r} or decoder_rank = None."
                )
        if self.decoder_rank > min(self.num_features, self.d_model):
            raise ConfigError(
                f"CLTConfig.decoder_rank = {self.decoder_rank} is more than {self.num_features} features by "
                f"d_model = {self.d_model} can have. Lower it, or set decoder_rank = None for full decoders."
            )

    def _check_k(self) -> None:
        """topk and batchtopk need a k that fits the dictionary."""
        for name, k, mode in (
            ("topk", self.topk_k, self.topk_mode),
            ("batchtopk", self.batchtopk_k, self.batchtopk_mode),
        ):
            if self.activation_fn != name:
                continue
            if k is None:
                raise ConfigError(f"CLTConfig.activation_fn = {name!r} needs {name}_k (for example {name}_k=32).")
            if name == "topk" and k > 1 and k != int(k):
                raise ConfigError(
                    f"CLTConfig.topk_k = {k} is neither a whole number of features nor, below 1, a share of them. "
                    f"Use {int(k)}, or batchtopk, which keeps any number on average."
                )
            available = self._choices(mode)
            if k > available:
                raise ConfigError(
                    f"CLTConfig.{name}_k = {k} is more than the {available} features there are to choose from "
                    f"({name}_mode = {mode!r}). Lower {name}_k or raise num_features."
                )

    def _choices(self, mode: str) -> int:
        """How many features compete for the k places."""
        return self.num_features * (self.num_layers if mode == "global" else 1)

    @property
    def topk_count(self) -> int:
        """How many features topk keeps per token, with a share of them (topk_k < 1) counted out, rounded up."""
        k = self.topk_k or 0
        return math.ceil(k * self._choices(self.topk_mode)) if k < 1 else round(k)

    @property
    def span(self) -> int:
        """How many targets the longest window has."""
        longest = self.num_layers - self.first_target
        return longest if self.n_targets is None else min(self.n_targets, longest)

    def targets_of(self, source: int) -> range:
        """The layers a feature of layer `source` writes to."""
        first = source + self.first_target
        return range(min(first, self.num_layers), min(first + self.span, self.num_layers))

    def sources_of(self, target: int) -> range:
        """The layers whose features write to layer `target`."""
        last = target - self.first_target
        return range(max(0, last - self.span + 1), max(0, last + 1))

    def skip_targets_of(self, source: int) -> range:
        """The layers that the skip connection of layer `source` writes to."""
        match self.skip_connection:
            case "own":
                return range(source, source + 1)
            case "all":
                return self.targets_of(source)
            case _:
                return range(0)


_CHOICES: dict[str, tuple[str, ...]] = {
    "decoder_tying": get_args(DecoderTying),
    "post_encoder": ("target", "pair"),
    "skip_connection": get_args(SkipConnection),
    "activation_fn": get_args(ActivationFn),
    "jumprelu_gradient": ("theta", "h"),
    "jumprelu_reach": ("threshold", "all"),
    "topk_mode": get_args(ScopeMode),
    "batchtopk_mode": get_args(ScopeMode),
    "ranking": ("norm", "value"),
    "input_norm": ("none", "layer"),
    "normalization_method": ("rms", "mean_std", "sqrt_d_model", "none"),
}
