"""EleutherAI's clt-training options in ours.

`clt train --preset eleuther` takes them as flags or as JSON.

    theirs                              ours
    num_latents | expansion_factor      num_features (expansion_factor * d_model)
    k, activation topk                  topk_k per layer, ranked by value
    k, activation batchtopk             batchtopk_k per layer, ranked by value
    cross_layer C                       first_target 0, n_targets C; 0: per-layer transcoders (n_targets 1)
    coalesce_topk none, per-layer       decoder_tying none (per-layer only stores the same decoders by target)
    coalesce_topk concat                decoder_tying per_target
    per_source_tied                     decoder_tying per_source
    train_post_encoder                  enable_feature_offset, post_encoder pair (untrained, their offset stays 0)
    post_encoder_scale                  enable_feature_scale, post_encoder pair
    skip_connection                     skip_connection all; own where decoding is coalesced
    normalize_io                        normalization_method rms, else none
    dtype                               clt_dtype

Their scale for later layers starts at 0, which together with their zero decoders never learns; ours starts at 1
(untied) or 0.1 (tied). What has no counterpart is refused, with the reason.
"""

from dataclasses import asdict, dataclass
from typing import Any

from clt.config.base import Config
from clt.config.clt_config import CLTConfig, DecoderTying, SkipConnection
from clt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EleutherOptions(Config):
    """Their options of a transcoder, under their names and with their defaults (except `transcode`)."""

    transcode: bool = True
    """Predict what the MLP writes from what it reads; always on."""
    cross_layer: int = 0
    """How many MLPs a feature writes to, its own included; 0: per-layer transcoders."""
    coalesce_topk: str = "none"
    """none, per-layer: a decoder per (source, target); concat: one per target."""
    topk_coalesced: bool = False
    """Not supported: k features chosen anew for each target."""
    per_source_tied: bool = False
    """One decoder per source, shared by its targets."""
    post_encoder_scale: bool = False
    """A learned scale per (source, target)."""
    train_post_encoder: bool = True
    """A learned offset per (source, target)."""
    skip_connection: bool = False
    """A linear path beside the features."""
    activation: str = "topk"
    """topk or batchtopk."""
    k: int = 32
    """Features kept per token and layer."""
    expansion_factor: int = 32
    """Features per layer, in multiples of the host's width."""
    num_latents: int = 0
    """Features per layer; 0: by expansion_factor."""
    normalize_io: bool = False
    """Bring every layer's inputs and outputs to one scale."""
    dtype: str = "none"
    """Type of the parameters: none (float32), float32, float16, bfloat16."""
    divide_cross_layer: bool = False
    """Not supported: contributions divided by the number of sources."""
    secondary_target_tied: bool = False
    """Not supported: a second decoding by target."""
    use_fp8: bool = False
    """Not supported: products in fp8."""
    tp_output: bool = True
    """No effect: how tensors are sharded."""
    n_targets: int = 0
    """No effect: their trainer fills it in from cross_layer."""
    n_sources: int = 0
    """No effect, likewise."""
    normalize_decoder: bool = True
    """No effect: theirs is for autoencoders only."""


_DEFAULTS: dict[str, Any] = {"num_layers": None, "d_model": None, "model_name": None, **asdict(EleutherOptions())}
_REFUSED: tuple[tuple[str, Any, str], ...] = (
    (
        "transcode",
        False,
        "it would reconstruct an MLP's output from itself. Transcoders read what the MLP reads: leave transcode out",
    ),
    (
        "topk_coalesced",
        True,
        "it chooses the k features anew for every target, so a feature has no one activation that a replacement could "
        "spend or an attribution could follow. The nearest thing is CLTConfig.topk_mode = 'global': one choice per "
        "token over all layers",
    ),
    ("coalesce_topk", "group", "it is not implemented there either. Use none, concat or per-layer"),
    ("activation", "groupmax", "there is no such activation here. Use topk or batchtopk"),
    (
        "divide_cross_layer",
        True,
        "a feature's effect would depend on how many other layers write to its target. Scales can learn the same: "
        "post_encoder_scale",
    ),
    (
        "secondary_target_tied",
        True,
        "it decodes every feature twice, counting biases and skips double. Choose per_source_tied or coalesce_topk = "
        "concat",
    ),
    ("use_fp8", True, "products in fp8 with fixed scales are not supported. Use dtype = bfloat16"),
)
_DTYPES = {"none": None, "float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


def eleuther_config(values: dict[str, Any]) -> CLTConfig:
    """The transcoder that EleutherAI's options describe.

    Args:
        values: their names; `num_layers` and `d_model` (theirs: `d_in`) are needed, everything else has their
            default, except `transcode`, which is always on.

    Raises:
        ConfigError: an option that is not theirs, or that has no counterpart here.
    """
    given = {"d_model" if name == "d_in" else name: value for name, value in values.items()}
    unknown = sorted(given.keys() - _DEFAULTS.keys())
    if unknown:
        raise ConfigError(
            f"EleutherAI's transcoders have no option {', '.join(map(repr, unknown))}. "
            f"Options: {', '.join(sorted(_DEFAULTS))}."
        )
    options = {**_DEFAULTS, **given}
    _refuse(options)
    if options["num_layers"] is None or options["d_model"] is None:
        raise ConfigError("eleuther_config needs num_layers and d_model (or d_in) of the host.")
    scaled = bool(options["post_encoder_scale"] and options["cross_layer"])
    return CLTConfig(
        num_features=options["num_latents"] or options["expansion_factor"] * options["d_model"],
        num_layers=options["num_layers"],
        d_model=options["d_model"],
        model_name=options["model_name"],
        n_targets=max(options["cross_layer"], 1),
        decoder_tying=_tying(options),
        enable_feature_offset=options["train_post_encoder"],
        enable_feature_scale=scaled,
        post_encoder="pair",
        skip_connection=_skip(options),
        normalization_method="rms" if options["normalize_io"] else "none",
        clt_dtype=_DTYPES[options["dtype"]],
        ranking="value",
        activation_fn=options["activation"],
        topk_k=options["k"] if options["activation"] == "topk" else None,
        batchtopk_k=options["k"] if options["activation"] == "batchtopk" else None,
        batchtopk_mode="per_layer",
    )


def _refuse(options: dict[str, Any]) -> None:
    """What cannot be expressed, and what contradicts itself."""
    for name, value, reason in _REFUSED:
        if options[name] == value:
            raise ConfigError(f"EleutherAI's {name} = {value!r} has no counterpart here: {reason}.")
    for name, allowed in (
        ("coalesce_topk", ("none", "concat", "per-layer")),
        ("activation", ("topk", "batchtopk")),
        ("dtype", tuple(_DTYPES)),
    ):
        if options[name] not in allowed:
            raise ConfigError(f"EleutherAI's {name} = {options[name]!r} is not one of {', '.join(allowed)}.")
    if options["per_source_tied"] and options["coalesce_topk"] != "none":
        raise ConfigError(
            f"per_source_tied shares decoders by source, coalesce_topk = {options['coalesce_topk']!r} keeps them by "
            "target. Choose one."
        )
    if options["post_encoder_scale"] and not options["train_post_encoder"] and options["cross_layer"]:
        raise ConfigError(
            "post_encoder_scale = True with train_post_encoder = False freezes the scale of all later layers at its "
            "start, 0: nothing would be cross-layer. Train it, or leave the scale out."
        )


def _tying(options: dict[str, Any]) -> DecoderTying:
    if options["per_source_tied"]:
        return "per_source"
    return "per_target" if options["coalesce_topk"] == "concat" else "none"


def _skip(options: dict[str, Any]) -> SkipConnection:
    if not options["skip_connection"]:
        return "none"
    return "all" if options["coalesce_topk"] == "none" else "own"
