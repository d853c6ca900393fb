"""The host as an affine map: from embeddings and MLP outputs to everything the decoder reads.

`adapter.linearised(inputs)` runs the host once on one prompt and records what makes it curved (linear_constants.py).
`LinearHost.run` then recomputes the decoder for any embeddings and any MLP outputs, several rows at a time, with those
values held. Run on the host's own embeddings and MLP outputs it gives the host's own values; gradients through it are
direct linear effects, from an MLP output to a later layer's input, past all other MLPs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from clt.errors import HostModelError
from clt.lm.hooks import Site, SitePair, _first, _first_argument, _with_first
from clt.lm.linear_constants import Constants, not_linear
from clt.types import Hookpoint

Write = Callable[[int, Tensor], Tensor]
"""(layer, what its MLP reads `[row, position, d_model]`) -> what the MLP puts out, of the same shape."""


@dataclass(frozen=True)
class LinearHost:
    """One prompt's host with attention patterns and norm denominators held; see `run`."""

    embeddings: Float[Tensor, "position d_model"]
    """What enters the decoder: token embeddings, with image features in their places."""
    reads: Float[Tensor, "layer position d_model"]
    """What each layer is read at (the adapter's input hookpoint)."""
    writes: Float[Tensor, "layer position d_model"]
    """The true MLP outputs (at the output hookpoint)."""
    final: Float[Tensor, "position d_model"]
    """What the unembedding reads: the decoder's output, after the last norm."""
    logits: Float[Tensor, "kept vocabulary"]
    """At the positions asked for."""
    unembedding: Float[Tensor, "vocabulary d_model"]
    """Rows of the output embedding."""
    _decoder: Decoder
    _constants: Constants

    @property
    def pattern_bytes(self) -> int:
        """Size of the attention patterns that are held."""
        return self._constants.pattern_bytes

    def run(
        self, embeddings: Float[Tensor, "row position d_model"], write: Write
    ) -> Float[Tensor, "row position d_model"]:
        """The decoder's output for these embeddings, with `write` in place of every MLP.

        `write` is called once per layer, in order, and sees what that layer reads. Values and gradients are those of
        an affine map of the embeddings and of everything `write` returns.
        """
        return self._decoder.replay(embeddings, write, self._constants)

    def run_for_gradients(
        self, embeddings: Float[Tensor, "row position d_model"], write: Write
    ) -> Float[Tensor, "row position d_model"]:
        """As `run`, but only gradients are right, not values: those of an affine map do not depend on its argument."""
        with self._constants.without_values():
            return self._decoder.replay(embeddings, write, self._constants)


class Decoder:
    """The blocks of a host with what surrounds them, callable on embeddings."""

    def __init__(self, model: PreTrainedModel, hookpoints: Sequence[Hookpoint], pairs: Sequence[SitePair]) -> None:
        """Find the module that holds the blocks."""
        self._model = model
        self._pairs = pairs
        blocks = hookpoints[0].input_path.split(f".{hookpoints[0].layer}.")[0]
        self.module = model.get_submodule(blocks.rpartition(".")[0])
        self._parameters = inspect.signature(self.module.forward)
        self._arguments: dict[str, Any] = {}
        self._beside: dict[int, tuple[Any, ...]] = {}
        self._positions = 0

    def record(self, arguments: Mapping[str, Any], keep: Sequence[int]) -> LinearHost:
        """Run the whole host once and note everything."""
        constants = Constants()
        self._positions = arguments["input_ids"].shape[1]
        seen: dict[str, Tensor] = {}
        reads: list[Tensor] = []
        writes: list[Tensor] = []

        def write(layer: int, x: Tensor, y: Tensor) -> Tensor:
            reads.append(x[0].detach().clone())
            writes.append(y[0].detach().clone())
            return y

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._watching(seen, constants))
            stack.enter_context(self._cut(write, constants))
            stack.enter_context(constants.passing(self.module))
            stack.enter_context(constants.paused())
            logits = self._logits(arguments, keep)
        if len(reads) != len(self._pairs):
            raise HostModelError(
                f"{type(self._model).__name__} ran {len(reads)} of its {len(self._pairs)} MLPs; it must run each once."
            )
        final = seen["final"][0]
        if not torch.equal(seen["head"][0], final[keep]) and not torch.equal(seen["head"][0], final):
            raise not_linear(type(self._model).__name__, "it changes what leaves the decoder before the unembedding")
        head: Any = self._model.get_output_embeddings()
        stacks = torch.stack(reads), torch.stack(writes)
        return LinearHost(seen["embeddings"][0], *stacks, final, logits, head.weight.detach(), self, constants)

    def replay(self, embeddings: Tensor, write: Write, constants: Constants) -> Tensor:
        """Run the decoder alone with the recorded constants."""
        mask = self._arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask.expand(len(embeddings), -1)
        arguments = {**self._arguments, "attention_mask": mask, "inputs_embeds": embeddings}
        with ExitStack() as stack:
            stack.enter_context(self._cut(lambda layer, x, y: write(layer, x), constants))
            stack.enter_context(constants.passing(self.module))
            stack.enter_context(_without_gradients(self.module))
            return _first(self._called(arguments))

    def _called(self, arguments: Mapping[str, Any]) -> Any:
        output = self.module(**arguments)
        return output if isinstance(output, tuple | Tensor) else (output.last_hidden_state,)

    def _logits(self, arguments: Mapping[str, Any], keep: Sequence[int]) -> Tensor:
        """The logits at some positions, and only those computed where the host can."""
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            places = torch.tensor(keep, device=self._model.device)
            return self._model(**arguments, logits_to_keep=places).logits[0].detach()
        return self._model(**arguments).logits[0, keep].detach()

    @contextmanager
    def _watching(self, seen: dict[str, Tensor], constants: Constants) -> Iterator[None]:
        """Note what enters and leaves the decoder, and how it is called; constants are held inside it only."""
        head: Any = self._model.get_output_embeddings()

        def embedded(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.setdefault("embeddings", output.detach().clone())

        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._arguments = self._bound(args, kwargs)
            embeddings = self._arguments.pop("inputs_embeds", None)
            self._arguments.pop("input_ids", None)
            seen.pop("embeddings", None)
            if embeddings is not None:
                seen["embeddings"] = embeddings.detach().clone()
            constants.pause(False)

        def left(module: nn.Module, args: Any, output: Any) -> None:
            constants.pause()
            seen["final"] = (output if isinstance(output, tuple) else (output.last_hidden_state,))[0].detach()

        def unembedded(module: nn.Module, args: Any) -> None:
            seen["head"] = args[0].detach()

        handles = (
            self.module.register_forward_pre_hook(entered, with_kwargs=True),
            self._model.get_input_embeddings().register_forward_hook(embedded),
            self.module.register_forward_hook(left),
            head.register_forward_pre_hook(unembedded),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _bound(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments of the decoder's forward by name, however they were passed."""
        bound = dict(self._parameters.bind(*args, **kwargs).arguments)
        for parameter in self._parameters.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(parameter.name, {}))
        return {**bound, "use_cache": False}

    @contextmanager
    def _cut(self, write: Callable[[int, Tensor, Tensor], Tensor], constants: Constants) -> Iterator[None]:
        """Give every MLP's output to `write`, and let no gradient through the MLP itself."""
        undo: list[Callable[[], None]] = []
        try:
            for pair in self._pairs:
                cut = self._swap_module if pair.is_whole_module else self._cut_between
                undo.extend(cut(pair, write, constants))
            yield
        finally:
            for restore in reversed(undo):
                restore()

    def _swap_module(
        self, pair: SitePair, write: Callable[[int, Tensor, Tensor], Tensor], constants: Constants
    ) -> list[Callable[[], None]]:
        """A whole module computes only while recording; what it returns beside its value is kept for later."""
        module, layer = pair.output.module, pair.layer
        original, before = module.forward, module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = self._shaped(_first_argument(args, kwargs))
            if not constants.is_recording:
                y = write(layer, x, x).reshape(_first_argument(args, kwargs).shape)
                return (y, *self._beside[layer]) if layer in self._beside else y
            with constants.paused():
                output = original(*args, **kwargs)
            if isinstance(output, tuple):
                self._beside[layer] = output[1:]
            return _with_first(output, lambda y: write(layer, x, self._shaped(y)).reshape(y.shape))

        def restore() -> None:
            if before is None:
                del module.forward
            else:
                module.forward = before

        module.forward = forward
        return [restore]

    def _cut_between(
        self, pair: SitePair, write: Callable[[int, Tensor, Tensor], Tensor], constants: Constants
    ) -> list[Callable[[], None]]:
        """Where reading and writing are different modules: go on from the reading site without gradient."""
        seen: list[Tensor] = []

        def enter(x: Tensor) -> Tensor:
            seen.append(self._shaped(x))
            return x.detach()

        def leave(y: Tensor) -> Tensor:
            if not seen:
                raise HostModelError(
                    f"{pair.output.path} ran before {pair.input.path}. Exchange the two templates, or name an input "
                    "that comes before the output."
                )
            return write(pair.layer, seen.pop(), self._shaped(y)).reshape(y.shape)

        sites: tuple[tuple[Site, Callable[[Tensor], Tensor]], ...] = ((pair.input, enter), (pair.output, leave))
        return [site.overwrite(change).remove for site, change in sites]

    def _shaped(self, x: Tensor) -> Tensor:
        """With rows and positions apart; some hosts flatten them before their MLPs."""
        return x.reshape(-1, self._positions, x.shape[-1])


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """Weights are constants too; gradients of theirs would only cost."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
