"""Options as the words of a command line: what a reader can paste to ask for the same again."""

from __future__ import annotations

import dataclasses
from collections.abc import Container

from clt.config.base import Config


def flags_of(config: Config, leave_out: Container[str] = ()) -> list[str]:
    """The flags that turn the defaults of a configuration into this one, for a command that takes its fields as flags.

    Args:
        leave_out: fields that the command has no flag for, or that need not be the same again.
    """
    words: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in leave_out or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words
