"""Reading a host through nnsight instead of plain hooks: the same values, and its remote execution (NDIF).

nnsight runs the whole model, its language head included, and keeps whole layers until the pass ends, so plain hooks are
faster and smaller; this is for those who have nnsight's services.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from clt.errors import ConfigError
from clt.lm.adapter import ModelAdapter
from clt.lm.hooks import Captured
from clt.lm.inputs import HostInputs


def require_nnsight() -> None:
    """Refuse to begin without the package.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("nnsight") is None:
        raise ConfigError(
            "backend = 'nnsight' needs the package nnsight, which is not installed. `pip install 'crosslayer[nnsight]'`"
            " (or nnsight itself), or leave --backend out: plain hooks capture the same values."
        )


def through_nnsight(
    adapter: ModelAdapter, tracer_kwargs: dict[str, Any] | None = None, invoker_args: dict[str, Any] | None = None
) -> NNsightAdapter:
    """The same host, captured through nnsight.

    Args:
        adapter: the host and where to read it.
        tracer_kwargs: passed on to nnsight's `trace`; with `remote` the host named by the adapter runs on NDIF.
        invoker_args: passed on to nnsight's `invoke`.

    Raises:
        ConfigError: nnsight is not installed.
    """
    require_nnsight()
    return NNsightAdapter(adapter, tracer_kwargs or {}, invoker_args or {})


class NNsightAdapter(ModelAdapter):
    """A `ModelAdapter` whose `capture` goes through nnsight; everything else is as before."""

    def __init__(self, adapter: ModelAdapter, tracer_kwargs: dict[str, Any], invoker_args: dict[str, Any]) -> None:
        super().__init__(
            adapter.model,
            tokenizer=adapter.tokenizer,
            processor=adapter.processor,
            name=adapter.name,
            input_template=adapter.input_template,
            output_template=adapter.output_template,
        )
        nnsight = importlib.import_module("nnsight")
        self._tracer_kwargs = tracer_kwargs
        self._invoker_args = invoker_args
        if tracer_kwargs.get("remote"):
            self._traced = nnsight.LanguageModel(self.name, tokenizer=self.tokenizer)
        else:
            self._traced = nnsight.NNsight(self.model)

    def _captured(self, inputs: HostInputs, keep: Bool[Tensor, "row position"]) -> Captured:
        sites = [
            (side, pair.layer, site) for pair in self._pairs for side, site in zip(("inputs", "targets"), pair[1:])
        ]
        where = [(site.path.rpartition(".")[0], site.is_input) for _, _, site in sites]
        values = _trace(self._traced, where, self._arguments(inputs), self._tracer_kwargs, self._invoker_args)
        captured = Captured(self.n_layers, self.d_model, keep)
        for (side, layer, site), value in zip(sites, values, strict=True):
            captured.put(side, layer, site, value[0] if isinstance(value, tuple) else value)
        return captured


def _trace(
    traced: Any,
    where: Sequence[tuple[str, bool]],
    arguments: dict[str, Any],
    tracer_kwargs: dict[str, Any],
    invoker_args: dict[str, Any],
) -> list[Any]:
    """What passed the modules; nnsight reads the source of this block and runs it inside the forward pass."""
    nnsight = importlib.import_module("nnsight")
    with traced.trace(**tracer_kwargs) as tracer:  # noqa: SIM117  nnsight parses the two blocks one by one
        with tracer.invoke(**arguments, **invoker_args):
            values = nnsight.save([])
            for path, is_input in where:
                module = traced.get(path)
                values.append(module.input if is_input else module.output)
    return values
