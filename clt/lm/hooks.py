"""Reading and overwriting values inside a host with plain forward hooks; everything is undone on exit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clt.errors import HostModelError

Predict = Callable[[int, Tensor], Tensor]
"""(layer, what its MLP reads) -> what the MLP puts out instead, of the same shape."""
Change = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, what its MLP reads, what it puts out) -> what it puts out instead, of the same shape."""
Receive = Callable[[int, Tensor], None]
"""(layer, what its MLP reads): looks and changes nothing."""


class Site(NamedTuple):
    """One value inside the host: what enters or leaves a module."""

    path: str
    """For messages: module path with suffix `.input` or `.output`."""
    module: nn.Module
    is_input: bool

    def read(self, receive: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `receive` with the value each time it passes."""
        if self.is_input:
            return self.module.register_forward_pre_hook(
                lambda module, args, kwargs: receive(_first_argument(args, kwargs)), with_kwargs=True
            )
        return self.module.register_forward_hook(lambda module, args, output: receive(_first(output)))

    def overwrite(self, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Let the host go on with `change(value)`."""
        if self.is_input:
            return self.module.register_forward_pre_hook(
                lambda module, args, kwargs: _with_first_argument(args, kwargs, change), with_kwargs=True
            )
        return self.module.register_forward_hook(lambda module, args, output: _with_first(output, change))


class SitePair(NamedTuple):
    """Where one layer is read and where its MLP output leaves."""

    layer: int
    input: Site
    output: Site

    @property
    def is_whole_module(self) -> bool:
        """Whether the pair is one module's input and output, so that the module need not run to be replaced."""
        return self.input.module is self.output.module and self.input.is_input and not self.output.is_input


class Captured:
    """What the MLPs read and wrote in the last forward pass, layers stacked.

    With a `keep` mask the kept positions of all rows lie in one axis, `[layer, token, d_model]`; without it
    the host's own shape is kept, `[layer, row, position, d_model]`.
    """

    def __init__(self, n_layers: int, d_model: int, keep: Bool[Tensor, "row position"] | None) -> None:
        """Hold nothing yet."""
        self._n_layers = n_layers
        self._d_model = d_model
        self._kept = None if keep is None else keep.reshape(-1).nonzero().squeeze(1)
        self._stacks: dict[str, Tensor] = {}

    @property
    def inputs(self) -> Float[Tensor, "layer *token d_model"]:
        """What the MLPs read."""
        return self._stack("inputs")

    @property
    def targets(self) -> Float[Tensor, "layer *token d_model"]:
        """What the MLPs wrote."""
        return self._stack("targets")

    def put(self, side: str, layer: int, site: Site, value: Tensor) -> None:
        """Copy one layer's value; a copy, because hosts may go on to change theirs in place."""
        if value.shape[-1] != self._d_model:
            raise HostModelError(
                f"{site.path} carries {value.shape[-1]} values per token, but the host's d_model is {self._d_model}. "
                "The template probably names a module inside the MLP; name what reads from or writes to the "
                "residual stream."
            )
        value = value.detach()
        if self._kept is not None:
            value = value.reshape(-1, self._d_model)
            if len(self._kept) < len(value):  # without padding, one copy is enough
                value = value.index_select(0, self._kept.to(value.device))
        if layer == 0:
            stack = self._stacks.get(side)
            if stack is None or stack.shape[1:] != value.shape:
                self._stacks[side] = value.new_empty(self._n_layers, *value.shape)
        self._stacks[side][layer] = value

    def _stack(self, side: str) -> Tensor:
        if side not in self._stacks:
            raise HostModelError("Nothing was captured: the host did not run inside `with adapter.capturing()`.")
        return self._stacks[side]


@contextmanager
def capturing(pairs: Sequence[SitePair], d_model: int, keep: Bool[Tensor, "row position"] | None) -> Iterator[Captured]:
    """Read all pairs while the block runs."""
    captured = Captured(len(pairs), d_model, keep)
    handles: list[RemovableHandle] = []
    try:
        for layer, read, write in pairs:
            for side, site in (("inputs", read), ("targets", write)):
                handles.append(site.read(_putting(captured, side, layer, site)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _putting(captured: Captured, side: str, layer: int, site: Site) -> Callable[[Tensor], None]:
    return lambda value: captured.put(side, layer, site, value)


@contextmanager
def replacing(pairs: Sequence[SitePair], predict: Predict, returns_tuple: dict[str, bool]) -> Iterator[None]:
    """Put `predict` in place of the MLPs while the block runs.

    Args:
        pairs: the layers to replace.
        predict: called once per layer and forward pass, in the order of the host.
        returns_tuple: whether a module returns more than its value (mixtures of experts add router scores), by
            path; learnt on first use, since only a module that returns nothing else can be skipped.
    """
    undo: list[Callable[[], None]] = []
    try:
        for pair in pairs:
            if pair.is_whole_module:
                undo.append(_swap_forward(pair, predict, returns_tuple))
            else:
                undo.extend(_overwrite_output(pair, predict))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _swap_forward(pair: SitePair, predict: Predict, returns_tuple: dict[str, bool]) -> Callable[[], None]:
    """Give the module another `forward`; its own is not computed."""
    module, path = pair.output.module, pair.output.path
    original = module.forward
    # accelerate and others set `forward` on the instance too: put back what was there, or nothing.
    before = module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        value = _first_argument(args, kwargs)
        prediction = predict(pair.layer, value).to(value.dtype)
        if returns_tuple.get(path, True):
            output = original(*args, **kwargs)
            returns_tuple[path] = isinstance(output, tuple)
            if returns_tuple[path]:
                return (prediction.view_as(output[0]), *output[1:])
        return prediction

    def restore() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    module.forward = forward
    return restore


def _overwrite_output(pair: SitePair, predict: Predict) -> list[Callable[[], None]]:
    """Remember what the layer read, and overwrite the output when it comes."""
    return _rewrite(pair, lambda layer, x, y: predict(layer, x).to(y.dtype).view_as(y))


def _rewrite(pair: SitePair, change: Change) -> list[Callable[[], None]]:
    seen: list[Tensor] = []

    def changed(output: Tensor) -> Tensor:
        if not seen:
            raise HostModelError(
                f"{pair.output.path} ran before {pair.input.path}. Exchange the two templates, or name an input "
                "that comes before the output."
            )
        return change(pair.layer, seen.pop(), output)

    return [pair.input.read(seen.append).remove, pair.output.overwrite(changed).remove]


@contextmanager
def rewriting(pairs: Sequence[SitePair], change: Change) -> Iterator[None]:
    """Pass what each layer reads and writes through `change` while the block runs."""
    undo: list[Callable[[], None]] = []
    try:
        for pair in pairs:
            undo.extend(_rewrite(pair, change))
        yield
    finally:
        for restore in reversed(undo):
            restore()


@contextmanager
def reading(pairs: Sequence[SitePair], receive: Receive) -> Iterator[None]:
    """Show what each layer reads, while the block runs."""
    handles: list[RemovableHandle] = []
    try:
        for pair in pairs:
            handles.append(pair.input.read(functools.partial(receive, pair.layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    """A module's value: its output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same output with its value changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def _with_first_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with the first one changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name, value = next(iter(kwargs.items()))
    return args, {**kwargs, name: change(value)}
