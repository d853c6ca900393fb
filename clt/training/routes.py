"""Which way a step is computed, chosen by how many features are on.

    plain    autograd over the model's own forward pass (step.py): every option there is
    dense    by hand, products of whole matrices
    mixed    by hand, relu and jumprelu: gathers for decoding and for the decoders' gradient, products for the rest
    sparse   by hand, only entries; no [token, feature] matrix outlives its layer

`auto` starts dense (topk and batchtopk: where their k says), and follows the measured density with a margin between
switching down and switching back, so that noise does not make it go to and fro.
"""

from __future__ import annotations

from typing import Literal

import torch

from clt.config import CLTConfig, TrainingConfig
from clt.models.kernels.build import library

Route = Literal["dense", "mixed", "sparse"]

# Below this density gathers are faster than products (docs/performance.md has the measurements): a property of what
# does the gathering and of how fast products are.
_BREAK_EVEN = {"compiled": {"fp32": 0.08, "bf16": 0.04}, "torch": {"fp32": 0.04, "bf16": 0.02}}
_BREAK_EVEN_CUDA = 0.005
# Back to products only above this many times the break-even.
_MARGIN = 1.5
# What a GPU is asked for only now and then, since asking waits for it.
_CUDA_INTERVAL = 16


def why_plain(clt: CLTConfig, training: TrainingConfig) -> str | None:
    """Which option the hand-written step does not know, as `field = value`; None: it knows them all."""
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
    return None


class RouteChooser:
    """The route of the next step."""

    def __init__(self, clt: CLTConfig, training: TrainingConfig, device: torch.device) -> None:
        self._clt, self._training = clt, training
        self._interval = 1 if device.type == "cpu" else _CUDA_INTERVAL
        self._low = _BREAK_EVEN_CUDA
        if device.type == "cpu":
            kernels = "torch" if library() is None else "compiled"
            self._low = _BREAK_EVEN[kernels]["bf16" if training.precision == "bf16" else "fp32"]
        self.route: Route = self._first()

    @property
    def chooses_k(self) -> bool:
        """Whether the number of kept features is given."""
        return self._clt.activation_fn in ("topk", "batchtopk")

    def _first(self) -> Route:
        if self._training.route in ("dense", "sparse"):
            return self._training.route  # pyright: ignore[reportReturnType]
        return (
            "sparse" if self.chooses_k and self._share_kept() * self._training.k_anneal_start < self._low else "dense"
        )

    def _share_kept(self) -> float:
        clt = self._clt
        is_global = (clt.topk_mode if clt.activation_fn == "topk" else clt.batchtopk_mode) == "global"
        k = clt.topk_count if clt.activation_fn == "topk" else clt.batchtopk_k or 0
        return k / (clt.num_features * (clt.num_layers if is_global else 1))

    def wants_density(self, step: int) -> bool:
        """Whether `observe` is to be called after this step."""
        return self._training.route == "auto" and step % self._interval == 0

    def observe(self, active: float, touched: float) -> None:
        """Take in the last step's densities.

        Args:
            active: share of all (token, feature) pairs that are on.
            touched: share that are on or get a gradient nevertheless.
        """
        high = _MARGIN * self._low
        if self.chooses_k:
            self.route = self._next("dense", "sparse", active, high)
        elif self.route == "sparse":
            self.route = "mixed" if touched > high else "sparse"
        elif self.route == "mixed" and touched < self._low:
            self.route = "sparse"
        else:
            self.route = self._next("dense", "mixed", active, high)

    def _next(self, many: Route, few: Route, density: float, high: float) -> Route:
        if self.route == few:
            return many if density > high else few
        return few if density < self._low else many
