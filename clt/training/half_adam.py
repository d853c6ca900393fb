"""Adam whose moments are kept in bf16, rounded at random: 4 instead of 8 bytes per weight.

To nearest, a running mean in bf16 would stop moving: with beta2 = 0.999 a step changes it by a thousandth, and bf16 has
two to three digits. Rounded up or down with a probability in proportion to the distance, it is right on average.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from clt.training.block_adam import Block, BlockAdam

# Odd numbers far apart, so that no two (seed, step, parameter) share a stream of random numbers.
_BY_SEED, _BY_PARAMETER = 1_000_003, 7_919


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down, each with the probability that makes the expectation right; infinities and NaN stay.

    bf16 is the upper half of an fp32 number's bits. Adding a random lower half carries over just as often as needed.
    """
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits = values.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class HalfAdam(BlockAdam):
    """Adam, or AdamW, with bf16 moments.

    Random numbers depend on the seed, the parameter's place and its count of steps alone, so a run that is gone on with
    takes the same ones.
    """

    def __init__(self, parameters: Iterable[Any], *arguments: Any, seed: int, **options: Any) -> None:
        """Take in parameters or groups of them.

        Args:
            parameters: as every optimiser of torch does.
            arguments: of BlockAdam.
            seed: of the rounding.
            options: of BlockAdam.
        """
        super().__init__(parameters, *arguments, **options)
        self._seed = seed
        every = (parameter for group in self.param_groups for parameter in group["params"])
        self._places = {parameter: place for place, parameter in enumerate(every)}

    def _moment_type(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def _generator_of(self, parameter: Tensor, count: int) -> torch.Generator:
        stream = self._seed * _BY_SEED + self._places[parameter] * _BY_PARAMETER
        return torch.Generator(parameter.device).manual_seed((stream << 24) + count)

    def _update(self, weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, block: Block) -> None:
        """The formula, in fp32; only what is kept is rounded."""
        group, count, generator = block.group, block.count, block.generator
        assert generator is not None
        (beta1, beta2), decay, rate = group["betas"], group["weight_decay"], float(group["lr"])
        grad = grad.float()
        if decay and self._is_decoupled:
            weight.mul_(1 - rate * decay)
        elif decay:
            grad = grad.add(weight, alpha=decay)
        new_mean = torch.lerp(mean.float(), grad, 1 - beta1)
        new_square = square.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        mean.copy_(round_at_random(new_mean, generator))
        square.copy_(round_at_random(new_square, generator))
        root = new_square.sqrt_().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
        weight.addcdiv_(new_mean, root, value=-rate / (1 - beta1**count))
