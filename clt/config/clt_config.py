"""What a cross-layer transcoder is: everything that is saved in `cfg.json` beside the weights."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from clt.config.base import Config, require_one_of, require_positive
from clt.errors import ConfigError

ActivationFn = Literal["relu", "jumprelu", "topk", "batchtopk"]
ScopeMode = Literal["per_layer", "global"]
NormalizationMethod = Literal["rms", "mean_std", "none", "auto", "estimated_mean_std"]

# crosslayer-coding's other names for mean_std. `auto` meant "mean_std if the data set has statistics"; ours always has.
_OLD_NORMALIZATION = {"auto": "mean_std", "estimated_mean_std": "mean_std"}


@dataclass(frozen=True, kw_only=True)
class CLTConfig(Config):
    """Shape and non-linearity of a transcoder."""

    num_features: int
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
    activation_fn: ActivationFn = "jumprelu"
    """How pre-activations become sparse activations."""
    jumprelu_threshold: float = 0.1
    """Threshold every JumpReLU feature starts from."""
    jumprelu_bandwidth: float = 2.0
    """Width of the window in which the threshold receives a straight-through gradient."""
    jumprelu_gradient: Literal["theta", "h"] = "theta"
    """Straight-through gradient of the threshold: -(theta/w), as in the paper, or crosslayer-coding's -(h/w)."""
    topk_k: int | None = None
    """Features kept per token: in each layer, or over all layers together if `topk_mode` is global."""
    topk_mode: ScopeMode = "per_layer"
    """Whether topk chooses within each layer or over all layers of a token together."""
    batchtopk_k: float | None = None
    """Features kept per token, on average over the batch: per layer, or in all if `batchtopk_mode` is global."""
    batchtopk_mode: ScopeMode = "global"
    """Whether batchtopk chooses within each layer or over all layers together."""
    ranking: Literal["norm", "value"] = "norm"
    """What topk and batchtopk rank by: activation times decoder norm, or the activation alone."""
    normalization_method: NormalizationMethod = "rms"
    """Standardisation inside the transcoder: one scale per layer, mean and std per dimension, or none."""
    clt_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the parameters; None is float32."""
    expected_input_dtype: str | None = None
    """Type the activations had in training, for reference."""
    mlp_input_template: str | None = None
    """Module path of what was read, with {} for the layer; for reference."""
    mlp_output_template: str | None = None
    """Module path of the MLP output, with {} for the layer; for reference."""

    def __post_init__(self) -> None:
        method = _OLD_NORMALIZATION.get(self.normalization_method, self.normalization_method)
        object.__setattr__(self, "normalization_method", method)
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
        )
        require_one_of("CLTConfig", "activation_fn", self.activation_fn, ("relu", "jumprelu", "topk", "batchtopk"))
        require_one_of("CLTConfig", "normalization_method", self.normalization_method, ("rms", "mean_std", "none"))
        require_one_of("CLTConfig", "topk_mode", self.topk_mode, ("per_layer", "global"))
        require_one_of("CLTConfig", "batchtopk_mode", self.batchtopk_mode, ("per_layer", "global"))
        if not 0 <= self.first_target < self.num_layers:
            raise ConfigError(
                f"CLTConfig.first_target = {self.first_target} leaves no target in a host of {self.num_layers} layers. "
                "Use 0 (own layer on) or 1 (later layers only)."
            )
        self._check_k()

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
            available = self.num_features * (self.num_layers if mode == "global" else 1)
            if k > available:
                raise ConfigError(
                    f"CLTConfig.{name}_k = {k} is more than the {available} features there are to choose from "
                    f"({name}_mode = {mode!r}). Lower {name}_k or raise num_features."
                )

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
