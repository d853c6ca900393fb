"""What a linearised host holds constant: attention patterns and norm denominators, recorded once and replayed.

Queries and keys only make patterns, and a norm is linear but for its denominator. With both held constant, and the MLPs
cut out, what is left of a decoder is an affine map. Both are caught where they are computed, whatever the module is
called: patterns through transformers' attention interface, denominators because every norm takes a (reciprocal) square
root. Source: Ameisen et al. 2025, "Circuit Tracing", section on the local replacement model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clt.errors import HostModelError
from clt.lm.patterns import Pattern
from clt.lm.products import carries_gradient_alone, product

_NAME = "crosslayer_frozen"
_ROOTS = {torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt}
_POWERS = {torch.pow, Tensor.pow, Tensor.__pow__}
_CURVED = {
    *(functional.silu, functional.gelu, functional.relu, functional.sigmoid, functional.tanh, functional.softmax),
    *(functional.softplus, functional.scaled_dot_product_attention, functional.elu, functional.leaky_relu),
    *(torch.sigmoid, torch.tanh, torch.softmax, torch.relu, torch.exp),
    *(Tensor.sigmoid, Tensor.tanh, Tensor.softmax, Tensor.relu, Tensor.exp),
}
"""Functions that are not linear and that nothing outside an MLP or an attention pattern should apply."""


class Constants:
    """Values in the order in which the host computes them: recorded in one pass, handed out again in later ones."""

    def __init__(self) -> None:
        """Start recording."""
        self._values: list[Tensor] = []
        self._patterns: list[Pattern] = []
        self._next: int | None = None
        self._next_pattern = 0
        self._is_paused = False
        self._with_values = True

    @property
    def is_recording(self) -> bool:
        """Whether this pass computes the constants."""
        return self._next is None

    @property
    def pattern_bytes(self) -> int:
        """Size of the patterns recorded so far."""
        return sum(pattern.n_bytes for pattern in self._patterns)

    def hold(self, compute: Callable[[], Tensor], length: int = 1) -> Tensor:
        """The value itself while recording, afterwards what was recorded at this place.

        Args:
            length: first dimension of what it is for; hosts that flatten rows and positions get it once per row.
        """
        if self._is_paused:
            return compute()
        if self._next is None:
            self._values.append(compute().detach())
            return self._values[-1]
        self._next += 1
        value = self._values[self._next - 1]
        if value.dim() == 0 or len(value) in (1, length):
            return value
        return value.repeat(length // len(value), *[1] * (value.dim() - 1))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the block compute as it likes: what runs in it runs in no other pass."""
        before = self._is_paused
        self.pause()
        try:
            yield
        finally:
            self._is_paused = before

    def pause(self, is_paused: bool = True) -> None:
        """Stop (or go on) holding values: other parts of the host, such as a vision tower, are no business of ours."""
        self._is_paused = is_paused

    @contextmanager
    def without_values(self) -> Iterator[None]:
        """Passes for the sake of their gradients alone: these depend on constants only, so products give zeros."""
        self._with_values = False
        try:
            yield
        finally:
            self._with_values = True

    @property
    def with_values(self) -> bool:
        """Whether products are computed."""
        return self._with_values

    @contextmanager
    def passing(self, decoder: nn.Module) -> Iterator[None]:
        """One pass of the host: the first records, all others replay."""
        with ExitStack() as stack:
            stack.enter_context(_attention(self, decoder))
            stack.enter_context(_Denominators(self))
            yield
        self._next = self._next_pattern = 0

    @contextmanager
    def holding_patterns(self, decoder: nn.Module) -> Iterator[None]:
        """One pass with the attention patterns alone held: the first records them, all others replay."""
        with _attention(self, decoder):
            yield
        self._next = self._next_pattern = 0

    def holding_pattern(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention as transformers asks for it; the pattern is the host's own, and has no gradient."""
        if self._is_paused or self._next is None:
            pattern = _pattern(module, query, key, value, mask, options)
            if not self._is_paused:
                self._patterns.append(pattern)
        else:
            pattern = self._patterns[self._next_pattern]
            self._next_pattern += 1
        return pattern.move(value, with_value=self._with_values).transpose(1, 2), None


def _pattern(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Pattern:
    """The pattern that the host's own plain attention makes.

    Raises:
        HostModelError: it has none, or does more with the values than moving them.
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise not_linear(type(module).__name__, "its module defines no eager_attention_forward to take patterns from")
    output, dense = eager(module, query, key, value, mask, **options)
    pattern = Pattern.of(dense)
    moved = pattern.move(value).transpose(1, 2)
    tolerance = 1e-4 if value.dtype == torch.float32 else 5e-2
    if not torch.allclose(output.float(), moved.float(), atol=tolerance * float(output.abs().max() + 1e-12)):
        raise not_linear(type(module).__name__, "its output is not its pattern times its values")
    return pattern


class _Denominators(TorchFunctionMode):
    """Hold the square roots of norms; refuse curved functions of what carries a gradient."""

    def __init__(self, constants: Constants) -> None:
        super().__init__()
        self._constants = constants

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ROOTS or (func in _POWERS and args[1:] and isinstance(args[1], float) and abs(args[1]) == 0.5):
            return self._constants.hold(lambda: func(*args, **kwargs), _length(args[0]))
        if func is functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func in (functional.rms_norm, torch.rms_norm):
            return self._rms_norm(*args, **kwargs)
        if func is functional.linear and len(args) >= 2 and carries_gradient_alone(args[0], args[1]):
            return product(args[0], args[1].T, *args[2:], **kwargs, with_value=self._constants.with_values)
        if func is torch.addmm and not kwargs and carries_gradient_alone(args[1], args[2]):
            return product(args[1], args[2], args[0], with_value=self._constants.with_values)
        if func in _CURVED and isinstance(args[0], Tensor) and args[0].requires_grad:
            raise not_linear(_module_in_charge(), f"it applies {getattr(func, '__name__', func)} outside its MLPs")
        return func(*args, **kwargs)

    def _layer_norm(
        self, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        dims = tuple(range(-len(shape), 0))
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        centred = wide - wide.mean(dims, keepdim=True)
        scale = self._constants.hold((centred.square().mean(dims, keepdim=True) + eps).rsqrt, len(x))
        return _affine((centred * scale).to(x.dtype), weight, bias)

    def _rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        dims = tuple(range(-len(shape), 0))
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        floor = torch.finfo(x.dtype).eps if eps is None else eps
        scale = self._constants.hold((wide.square().mean(dims, keepdim=True) + floor).rsqrt, len(x))
        return _affine((wide * scale).to(x.dtype), weight, None)


def _length(x: Any) -> int:
    return len(x) if isinstance(x, Tensor) and x.dim() else 1


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@contextmanager
def _attention(constants: Constants, decoder: nn.Module) -> Iterator[None]:
    """Let every attention module of the decoder call `holding_pattern`, then what it called before."""
    configs: dict[int, Any] = {id(config): config for config in map(_config, decoder.modules()) if config is not None}
    before = [(config, config._attn_implementation) for config in configs.values()]

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        return eager_mask(*args, **kwargs) if constants.is_recording else None

    ALL_ATTENTION_FUNCTIONS.register(_NAME, constants.holding_pattern)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, mask)
    try:
        for config, _ in before:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(_NAME, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(_NAME, None)


def _config(module: nn.Module) -> PreTrainedConfig | None:
    config = module.__dict__.get("config")
    return config if isinstance(config, PreTrainedConfig) else None


def not_linear(name: str, reason: str) -> HostModelError:
    """The refusal of a model that cannot be held linear."""
    return HostModelError(
        f"{name} cannot be linearised: {reason}. Attribution needs a decoder that is linear once attention patterns, "
        "norm denominators and MLP outputs are held constant. Use another host, or report this architecture."
    )


def _module_in_charge() -> str:
    """Class of the innermost module that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return type(module).__name__
        frame = frame.f_back
    return "The host"
