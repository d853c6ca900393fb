"""Which way a step is computed, chosen by how many features are on.

    plain    autograd over the model's own forward pass (step.py): every option there is
    dense    by hand, products of whole matrices
    mixed    by hand, relu and jumprelu: gathers for decoding and for the decoders' gradient, products for the rest
    sparse   by hand, only entries; no [token, feature] matrix outlives its layer

`auto` starts dense (topk and batchtopk: where their k says), and follows the measured density with a margin between
switching down and switching back, so that noise does not make it go to and fro.
"""

from __future__ import annotations

import torch

from clt.config import CLTConfig, TrainingConfig
from clt.models.kernels.build import library
from clt.training.route_options import BREAK_EVEN, BREAK_EVEN_CUDA, Route, chooses_k, first_route

# Back to products only above this many times the break-even.
_MARGIN = 1.5
# What a GPU is asked for only now and then, since asking waits for it.
_CUDA_INTERVAL = 16


class RouteChooser:
    """The route of the next step."""

    def __init__(self, clt: CLTConfig, training: TrainingConfig, device: torch.device) -> None:
        self._clt, self._training = clt, training
        self._interval = 1 if device.type == "cpu" else _CUDA_INTERVAL
        self._low = BREAK_EVEN_CUDA
        if device.type == "cpu":
            kernels = "torch" if library() is None else "compiled"
            self._low = BREAK_EVEN[kernels]["bf16" if training.precision == "bf16" else "fp32"]
        self.route: Route = first_route(clt, training, self._low)

    @property
    def chooses_k(self) -> bool:
        """Whether the number of kept features is given."""
        return chooses_k(self._clt)

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
