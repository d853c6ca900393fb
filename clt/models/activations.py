"""From pre-activations to sparse activations: relu, jumprelu, topk, batchtopk.

Sources: Rajamanoharan et al. 2024 (JumpReLU), Gao et al. 2024 (TopK), Bussmann et al. 2024 (BatchTopK),
Anthropic Circuits Updates, January 2025 (thresholds of JumpReLU, ranking by decoder norm).
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class JumpReLU(torch.autograd.Function):
    """h where h > theta, else 0, with the straight-through gradient for theta and, if asked for, h.

    `JumpReLU.apply(h, theta, bandwidth)` is crosslayer-coding's, with its gradient; use `jumprelu` otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, theta: Tensor, bandwidth: float, gradient: str = "h", reach: str = "threshold"
    ) -> Tensor:
        """The activation."""
        ctx.save_for_backward(h, theta)
        ctx.bandwidth, ctx.gradient, ctx.reach = bandwidth, gradient, reach
        return h * (h > theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Straight through the step, within the bandwidth."""
        (grad,) = grads
        h, theta = ctx.saved_tensors
        near = (h - theta).abs() < ctx.bandwidth / 2
        height = theta if ctx.gradient == "theta" else h
        step = grad * near * height / ctx.bandwidth
        grad_h = grad * (h > theta)
        return grad_h + step if ctx.reach == "all" else grad_h, -step.sum(0), None, None, None


def jumprelu(
    h: Float[Tensor, "token feature"],
    theta: Float[Tensor, " feature"],
    bandwidth: float = 2.0,
    gradient: Literal["theta", "h"] = "theta",
    reach: Literal["threshold", "all"] = "threshold",
) -> Float[Tensor, "token feature"]:
    """h where it exceeds its feature's threshold, else 0.

    The threshold gets the pseudo-gradient -(theta/w) 1[|h - theta| < w/2], which is right in
    expectation for a kernel of width w; `gradient="h"` is crosslayer-coding's -(h/w) instead.

    The step is a function of h - theta, so the same term with the opposite sign belongs to h. Rajamanoharan et al. give
    it to the threshold only (`reach="threshold"`, the default): the encoder then learns from features that are on.
    Anthropic let it flow to all parameters (`reach="all"`): in expectation an encoder bias then also sees the features
    it switches on. On made-up data with known features both reach the same error at the same number of active
    features; `all` needs two to three times the sparsity weight to get there.

    Source: Rajamanoharan et al. 2024, section 3; Anthropic Circuits Updates, January 2025.
    """
    return JumpReLU.apply(h, theta, bandwidth, gradient, reach)  # pyright: ignore[reportReturnType]


def topk_indices(scores: Float[Tensor, "token feature"], k: int) -> Int[Tensor, "token k"]:
    """Which k features of each token score highest, in no particular order; of equal ones, the first."""
    if k >= scores.shape[1]:
        return torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    values, chosen = scores.topk(k + 1, dim=1)
    tied = (values[:, -1] == values[:, -2]).nonzero()[:, 0] if k else chosen[:0, 0]
    if len(tied):
        chosen[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, : k + 1]
    return chosen[:, :k]


def count_kept(k: float, n_tokens: int, n_candidates: int) -> int:
    """How many entries a batch of `n_tokens` keeps: k per token on average, never more than there are."""
    return min(math.ceil(k * n_tokens), n_candidates)


def batch_threshold(scores: Float[Tensor, "*any"], n_kept: int) -> Float[Tensor, ""]:
    """The smallest score that is still kept when the `n_kept` largest of the whole batch are.

    Never below the smallest positive number, so a feature that is off is not kept for lack of others.
    """
    flat = scores.reshape(-1)
    if n_kept <= 0:
        return torch.full((), torch.inf, dtype=flat.dtype, device=flat.device)
    kth = flat.topk(n_kept, sorted=False).values.min()
    return kth.clamp_min(torch.finfo(flat.dtype).tiny)


def keep_above(
    h: Float[Tensor, "token feature"], keep: Bool[Tensor, "token feature"]
) -> Float[Tensor, "token feature"]:
    """h where it is kept and positive, else 0; gradients flow through what is kept."""
    return h.relu() * keep
