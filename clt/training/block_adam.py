"""Adam a block of numbers at a time, so that what it keeps may live in the host's memory and visit the device in turn.

The update of a number needs no other number, so blocks change nothing: in the type of the weights the result is that of
torch's own Adam, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from clt.training.host_blocks import HostBlocks
from clt.training.memory import block_numbers


@dataclass(frozen=True)
class Block:
    """Some numbers of a parameter, and how they are updated."""

    weight: Tensor
    grad: Tensor
    kept: tuple[Tensor, ...]
    """Mean, square and perhaps the master weights, where they live."""
    group: dict[str, Any]
    count: int
    """Of this parameter's steps, this one included."""
    generator: torch.Generator | None
    """Of the parameter's random numbers in this step, for those who round with them."""


class BlockAdam(torch.optim.Optimizer):
    """Adam, or AdamW with decoupled decay.

    Offloaded, moments live in the host's memory, and where weights have half precision, fp32 weights too, which are
    what is updated (fp32 moments then); the weights are these, rounded.

    Source: Kingma and Ba 2015; Loshchilov and Hutter 2019 (decoupled decay).
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        *,
        is_decoupled: bool,
        is_offloaded: bool,
        eps: float = 1e-8,
    ) -> None:
        """Take in parameters or groups of them.

        Args:
            parameters: as every optimiser of torch does.
            lr: learning rate.
            betas: decay of the running mean and square.
            is_decoupled: weight decay as AdamW has it, not as a part of the gradient.
            is_offloaded: keep everything but weights and gradients in the host's memory.
            eps: added to the root of the running square.
        """
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._is_decoupled, self._is_offloaded = is_decoupled, is_offloaded
        self._visits: HostBlocks | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for block, kept in self._visiting(self._blocks()):
            mean, square, *master = kept
            weight = master[0] if master else block.weight
            self._update(weight, block.grad.to(weight.dtype), mean, square, block)
            if master:
                block.weight.copy_(weight)

    @torch.no_grad()
    def begin(self) -> None:
        """Make every parameter's state, from the weights as they are, to be overwritten with what was saved."""
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self._state_of(parameter)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            has_master = self._is_offloaded and parameter.itemsize < 4
            dtype = self._moment_type(torch.float32 if has_master else parameter.dtype)
            where: dict[str, Any] = {"device": parameter.device}
            if self._is_offloaded:
                where = {"device": "cpu", "pin_memory": parameter.is_cuda}
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(parameter.shape, dtype=dtype, **where)
            if has_master:
                state["master"] = torch.empty(parameter.shape, dtype=torch.float32, **where).copy_(parameter)
        return state

    def _moment_type(self, dtype: torch.dtype) -> torch.dtype:
        """Of the moments of weights of a type."""
        return dtype

    def _generator_of(self, parameter: Tensor, count: int) -> torch.Generator | None:
        """Of a parameter's random numbers in a step."""
        return None

    def _blocks(self) -> Iterator[Block]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                state["step"] += 1
                count = int(state["step"])
                generator = self._generator_of(parameter, count)
                kept = (state[name] for name in ("exp_avg", "exp_avg_sq", "master") if name in state)
                size = block_numbers(parameter.is_cuda)
                whole = (tensor.view(-1).split(size) for tensor in (parameter, parameter.grad.contiguous(), *kept))
                for weight, grad, *parts in zip(*whole, strict=True):
                    yield Block(weight, grad, tuple(parts), group, count, generator)

    def _visiting(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, tuple[Tensor, ...]]]:
        """Every block with what is kept of it, on the weights' device."""
        if not self._is_offloaded:
            return ((block, block.kept) for block in blocks)
        if self._visits is None:
            self._visits = HostBlocks(self.param_groups[0]["params"][0].device)
        return self._visits.through((block, block.kept) for block in blocks)

    def _update(self, weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, block: Block) -> None:
        """Torch's own kernel."""
        group = block.group
        adam(
            *([weight], [grad], [mean], [square], []),
            [torch.full((), block.count - 1.0, device=weight.device)],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self._is_decoupled,
        )
