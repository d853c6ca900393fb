"""What every command understands beside its own options: --debug, --dry-run, --json, --config FILE.

A command is a module of `clt.scripts` with `Options` (a dataclass or a union of them) and `main(options)`. It may have
`plan(options)`: what `--dry-run` shows beside the options, without computing or writing anything; it raises what
`main` would raise at once. If `main` returns a dictionary, `--json` prints that and sends the words to standard error.
A command with a field `json` of its own prints it itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tyro

from clt.config.base import Config
from clt.errors import ConfigError

FLAGS = """Every command also takes:
  --dry-run      check the options, say what would be read and written, and do nothing
  --json         print the result (with --dry-run: the plan) as JSON, where the command has one
  --config FILE  take the options from a run.json or any other JSON this package wrote; flags given beside it win
  --debug        show the traceback of an error"""


@dataclasses.dataclass
class Shared:
    """The shared flags of one command line."""

    dry_run: bool = False
    json: bool = False
    config: Path | None = None


def take_shared(arguments: list[str], options_type: Any) -> Shared:
    """Take the shared flags out of the arguments, except those that the command has itself.

    Raises:
        ConfigError: --config is the last word, without a file.
    """
    own = set().union(*(_names(each) for each in alternatives(options_type)))
    shared = Shared()
    for name in ("dry_run", "json"):
        flag = "--" + name.replace("_", "-")
        given = [word for word in arguments if word in (flag, f"--{name}")]
        if given and name not in own:
            setattr(shared, name, True)
            arguments[:] = [word for word in arguments if word not in given]
    if "config" not in own:
        shared.config = _take_config(arguments)
    return shared


def alternatives(options_type: Any) -> tuple[Any, ...]:
    """The dataclasses of a union, or the one there is."""
    if isinstance(options_type, types.UnionType) or typing.get_origin(options_type) is typing.Union:
        return typing.get_args(options_type)
    return (options_type,)


def _names(options_type: type) -> set[str]:
    return {field.name for field in dataclasses.fields(options_type)}


def _take_config(arguments: list[str]) -> Path | None:
    for place, word in enumerate(arguments):
        flag, is_joined, value = word.partition("=")
        if flag != "--config":
            continue
        del arguments[place]
        if not is_joined:
            if place == len(arguments):
                raise ConfigError("--config needs a file: the run.json of a run, or any JSON of options.")
            value = arguments.pop(place)
        return Path(value)
    return None


def run_module(module: Any, name: str, arguments: list[str]) -> None:
    """Parse the arguments into the module's Options and do, or only describe, what they ask.

    Raises:
        ConfigError: a shared flag that this command cannot serve.
    """
    arguments = list(arguments)
    shared = take_shared(arguments, module.Options)
    # Indented lines stay lines; others would be joined into one paragraph.
    description = re.sub(r"(?m)^(?=(?:clt|torchrun) )", "    ", f"{module.__doc__}\n{FLAGS}")
    if shared.config is not None:
        default = options_from_file(module.Options, shared.config, name)
        options = tyro.cli(module.Options, default=default, prog=f"clt {name}", description=description, args=arguments)
    else:
        options = tyro.cli(module.Options, prog=f"clt {name}", description=description, args=arguments)
    if shared.dry_run:
        _print_plan(module, name, options, shared.json or getattr(options, "json", False))
    elif shared.json:
        _print_result(module, name, options)
    else:
        module.main(options)


def _print_result(module: Any, name: str, options: Any) -> None:
    if typing.get_type_hints(module.main)["return"] is type(None):
        raise ConfigError(f"`clt {name}` has no result to print as JSON; it says on the screen what it did.")
    with contextlib.redirect_stdout(sys.stderr):
        result = module.main(options)
    if result is not None:  # of several ranks, the first has it
        sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")


def _print_plan(module: Any, name: str, options: Any, as_json: bool) -> None:
    plan = module.plan(options) if hasattr(module, "plan") else {}
    values = plain(options)
    if as_json:
        sys.stdout.write(json.dumps({"command": name, "plan": plan, "options": values}, indent=2, default=str) + "\n")
        return
    lines = [f"clt {name} would:" if plan else f"clt {name}: the options are valid."]
    lines += [f"  {key:<9} {line}" for key, value in plan.items() for line in _several(value)]
    lines += ["with:", *(f"  {key} = {value!r}" for key, value in _flat(values))]
    sys.stdout.write("\n".join(lines) + "\nNothing was computed or written.\n")


def _several(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def plain(options: Any) -> dict[str, Any]:
    """Options as JSON takes them, without access tokens: a plan may be printed into a log."""
    values = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return {name: value for name, value in values.items() if name != "token" and not name.endswith("_token")}


def options_from_file(options_type: Any, path: Path, name: str) -> Any:
    """The options that a JSON file gives: themselves, or under `options` or `provenance.options`.

    Raises:
        ConfigError: no such file, no JSON, or options of another command.
    """
    if len(alternatives(options_type)) > 1:
        raise ConfigError(f"`clt {name}` is several commands in one and takes no --config.")
    file = path / "run.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no {file}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} is not JSON ({error}). Was it cut off?") from None
    for key in ("provenance", "options"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file} holds no options: it is a {type(values).__name__}, not an object.")
    try:
        return instance(options_type, values)
    except ConfigError as error:
        raise ConfigError(f"--config {file} does not hold the options of `clt {name}`: {error}") from None


def instance(options_type: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from JSON values, nested dataclasses, paths and tuples included.

    Raises:
        ConfigError: a name that is no option, or a required option that is missing.
    """
    values = dict(values)
    if issubclass(options_type, Config):
        values = options_type.migrate(values)
    hints = typing.get_type_hints(options_type)
    fields = {field.name: field for field in dataclasses.fields(options_type)}
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(f"{', '.join(map(repr, unknown))}: no such option. Options: {', '.join(sorted(fields))}.")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"it lacks {', '.join(map(repr, missing))}.")
    return options_type(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    """A JSON value as the type of its field."""
    if value is None:
        return None
    for choice in alternatives(hint):
        if dataclasses.is_dataclass(choice) and isinstance(value, Mapping):
            return instance(typing.cast(type, choice), value)
        if choice is Path and isinstance(value, str):
            return Path(value)
        if typing.get_origin(choice) is tuple and isinstance(value, list):
            return tuple(_typed(typing.get_args(choice)[0], each) for each in value)
    return value
