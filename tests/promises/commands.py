"""Command lines of the seeds, as printed there, made small enough for a test."""

import runpy
import shlex
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def words(command: str) -> list[str]:
    """The arguments after `python SCRIPT`, comments left out."""
    return shlex.split(command.replace("\\\n", " "), comments=True)[2:]


def smaller(arguments: list[str], **values: object) -> list[str]:
    """The same arguments with some flags' values replaced; every flag named must be there."""
    arguments = list(arguments)
    for name, value in values.items():
        (place,) = [i for i, word in enumerate(arguments) if word.replace("_", "-") == f"--{name.replace('_', '-')}"]
        arguments[place + 1] = str(value)
    return arguments


def run_script(monkeypatch, name: str, arguments: list[str]) -> None:
    """Run a launcher of `scripts/` in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")
