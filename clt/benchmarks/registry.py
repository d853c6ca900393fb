"""Benchmarks by name: ours, those of installed packages (entry points), and those a program registers itself."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from numbers import Real
from typing import Any

from clt.benchmarks.base import Benchmark
from clt.errors import BenchmarkError

GROUP = "crosslayer.benchmarks"
"""Entry point group: name = "module:factory"."""

BUILT_IN = {
    "amber": "clt.benchmarks.amber:amber",
    "chair": "clt.benchmarks.chair:Chair",
    "hallusionbench": "clt.benchmarks.hallusion:HallusionBench",
    "jsonl": "clt.benchmarks.jsonl:Jsonl",
    "llava-bench": "clt.benchmarks.llava_bench:LlavaBench",
    "mme": "clt.benchmarks.mme:MME",
    "mmhal": "clt.benchmarks.mmhal:MMHal",
    "object-halbench": "clt.benchmarks.chair:ObjectHalBench",
    "pope": "clt.benchmarks.pope:Pope",
}

Factory = Callable[..., Benchmark]
_registered: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Make `load(name, **options)` call the factory; lasts as long as the program.

    Raises:
        BenchmarkError: the name is taken by another factory.
    """
    if _registered.get(name, factory) is not factory or name in BUILT_IN:
        raise BenchmarkError(f"There is a benchmark {name!r} already. Register yours under another name.")
    _registered[name] = factory


def names() -> list[str]:
    """All names, sorted."""
    return sorted({*BUILT_IN, *_registered, *(point.name for point in entry_points(group=GROUP))})


def factory_of(name: str) -> Factory:
    """What makes the benchmark of that name; its module is imported now.

    Raises:
        BenchmarkError: there is none, or the entry point cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        return getattr(importlib.import_module(module), attribute)
    for point in entry_points(group=GROUP, name=name):
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise BenchmarkError(f"Benchmark {name!r} is announced by {point.value}, which fails: {error}.") from error
    close = difflib.get_close_matches(name.lower().replace("_", "-"), names(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise BenchmarkError(
        f"There is no benchmark {name!r}.{hint} There are: {', '.join(names())}.\n"
        f"Others come with packages that have an entry point in the group {GROUP!r}, or from `register`."
    )


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options that the benchmark's factory takes."""
    return dict(inspect.signature(factory_of(name)).parameters)


def load(name: str, **options: Any) -> Benchmark:
    """The benchmark of that name, reading its files as far as it needs them now.

    Raises:
        BenchmarkError: no such benchmark, an option it does not have, one that is no number although its default is,
            one that it needs and did not get, or data that cannot be read.
    """
    factory, known = factory_of(name), options_of(name)
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
    unknown = [option for option in options if option not in known and not takes_all]
    if unknown:
        raise BenchmarkError(
            f"{name} has no option {', '.join(map(repr, unknown))}. It has: {', '.join(known) or 'none'}."
        )
    needed = [each.name for each in known.values() if each.default is each.empty and each.kind is each.KEYWORD_ONLY]
    missing = [each for each in needed if each not in options]
    if missing:
        flags = ", ".join(f"--{each.replace('_', '-')}" for each in missing)
        raise BenchmarkError(f"{name} needs {', '.join(missing)} (on the command line: {flags}).")
    _check_numbers(name, known, options)
    return factory(**options)


def _check_numbers(name: str, known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> None:
    """Options whose default is a number are numbers."""
    for option, value in options.items():
        default = known[option].default if option in known else None
        is_number = isinstance(default, Real) and not isinstance(default, bool)
        if is_number and not isinstance(value, Real):
            raise BenchmarkError(f"{name}: option {option} = {value!r} must be a number, such as {default}.")
