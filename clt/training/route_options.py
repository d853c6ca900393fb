"""Which ways of computing a step a configuration allows, and which one it starts with; knows no tensors."""

from __future__ import annotations

from typing import Literal

from clt.config import CLTConfig, TrainingConfig

Route = Literal["dense", "mixed", "sparse"]

BREAK_EVEN = {"compiled": {"fp32": 0.08, "bf16": 0.04}, "torch": {"fp32": 0.04, "bf16": 0.02}}
"""Density below which gathers are faster than products on a CPU (docs/performance.md has the measurements): a property
of what does the gathering and of how fast products are."""
BREAK_EVEN_CUDA = 0.005
"""On a GPU."""


def why_plain(clt: CLTConfig, training: TrainingConfig, parts: int = 1) -> str | None:
    """Which option the hand-written step does not know, as `field = value`; None: it knows them all.

    Args:
        clt: the transcoder.
        training: how it is trained.
        parts: of its features, each on another rank, which choose together what topk and batchtopk keep.
    """
    odd = {
        "decoder_tying": clt.decoder_tying != "none",
        "decoder_rank": clt.decoder_rank is not None,
        "enable_feature_offset": clt.enable_feature_offset,
        "enable_feature_scale": clt.enable_feature_scale,
        "skip_connection": clt.skip_connection != "none",
        "precision": training.precision == "fp16",
        "sparsity_span_penalty": training.sparsity_span_penalty > 0,
        "torch_compile": training.torch_compile,
        "debug_anomaly": training.debug_anomaly,
        "clt_dtype": clt.clt_dtype not in (None, "float32"),
        "preactivation_form": training.preactivation_form == "negative" and clt.activation_fn in ("topk", "batchtopk"),
    }
    for name, is_odd in odd.items():
        if is_odd:
            return f"{name} = {getattr(clt if hasattr(clt, name) else training, name)!r}"
    return f"activation_fn = {clt.activation_fn!r} in {parts} parts (--tp)" if parts > 1 and chooses_k(clt) else None


def chooses_k(clt: CLTConfig) -> bool:
    """Whether the number of kept features is given."""
    return clt.activation_fn in ("topk", "batchtopk")


def kept_per_token(clt: CLTConfig) -> float:
    """Features of a layer that topk or batchtopk keeps for a token, on average."""
    is_global = (clt.topk_mode if clt.activation_fn == "topk" else clt.batchtopk_mode) == "global"
    k = clt.topk_count if clt.activation_fn == "topk" else clt.batchtopk_k or 0
    return k / (clt.num_layers if is_global else 1)


def first_route(clt: CLTConfig, training: TrainingConfig, break_even: float) -> Route:
    """The route of the first step, where the hand-written one is taken."""
    if training.route in ("dense", "sparse"):
        return training.route  # pyright: ignore[reportReturnType]
    few = chooses_k(clt) and kept_per_token(clt) / clt.num_features * training.k_anneal_start < break_even
    return "sparse" if few else "dense"
