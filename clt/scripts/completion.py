"""Print a shell's completion script: commands, their subcommands and flags; file names anywhere else.

clt completion bash > ~/.local/share/bash-completion/completions/clt
clt completion zsh  > ~/.clt-completion.zsh        # then, in ~/.zshrc:  source ~/.clt-completion.zsh
clt completion fish > ~/.config/fish/completions/clt.fish

Making it loads every command once, which takes some seconds; write it again after an update.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from clt.__main__ import COMMANDS, module_name
from clt.scripts.invoke import alternatives

SHARED_FLAGS = ("--dry-run", "--json", "--config", "--debug", "--help")

_BASH = """_clt() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} words=""
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$cur"))
    return
  fi
  case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{cases}
  esac
  if [[ $cur == -* ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
  elif (( COMP_CWORD == 2 )); then
    COMPREPLY=($(compgen -W "${{words//--*/}}" -- "$cur") $(compgen -f -- "$cur"))
  else
    COMPREPLY=($(compgen -f -- "$cur"))
  fi
}}
complete -o filenames -F _clt clt
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """For which shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """The shell."""


@dataclass(frozen=True)
class Words:
    """What may follow a command: names of subcommands, and flags by subcommand ("" without one)."""

    subcommands: tuple[str, ...]
    flags: Mapping[str, tuple[str, ...]]


def main(options: Options) -> None:
    """Print the script."""
    table = {name: words_of(name) for commands in COMMANDS.values() for name in commands}
    if options.shell == "fish":
        print(fish(table), end="")
        return
    if options.shell == "zsh":
        print("autoload -U +X compinit bashcompinit && compinit && bashcompinit")
    print(bash(table), end="")


def words_of(name: str) -> Words:
    """Subcommands and flags of a command, from its own help."""
    module = importlib.import_module(f"clt.scripts.{module_name(name)}")
    kinds = alternatives(module.Options)
    if len(kinds) == 1:
        return Words((), {"": flags_in(module.Options, [])})
    # tyro names the alternatives of a union after their classes.
    names = tuple(re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower() for kind in kinds)
    return Words(names, {each: flags_in(module.Options, [each]) for each in names})


def flags_in(options_type: Any, subcommand: list[str]) -> tuple[str, ...]:
    """The flags that a help text lists, in its order, and the shared ones."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(options_type, prog="clt", args=[*subcommand, "--help"])
    listed = (line for line in text.getvalue().splitlines() if re.match(r"\W*-", line))
    found = [flag for line in listed for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line)]
    return tuple(dict.fromkeys((*found, *SHARED_FLAGS)))


def bash(table: Mapping[str, Words]) -> str:
    """The script for bash, which zsh reads too."""
    cases = []
    for name, words in table.items():
        for subcommand, flags in words.flags.items():
            if subcommand:
                cases.append(f'    "{name} {subcommand}") words="{" ".join(flags)}" ;;')
            else:
                cases.append(f'    "{name} "*) words="{" ".join(flags)}" ;;')
        if words.subcommands:
            cases.append(f'    "{name} "*) words="{" ".join(words.subcommands)}" ;;')
    return _BASH.format(commands=" ".join(table), cases="\n".join(cases))


def fish(table: Mapping[str, Words]) -> str:
    """The script for fish."""
    lines = ["complete -c clt -n __fish_use_subcommand -f"]
    described = {name: line for commands in COMMANDS.values() for name, line in commands.items()}
    for name, words in table.items():
        text = described[name].replace("'", r"\'")
        lines.append(f"complete -c clt -n __fish_use_subcommand -a {name} -d '{text}'")
        for subcommand in words.subcommands:
            lines.append(f"complete -c clt -n '__fish_seen_subcommand_from {name}' -a {subcommand}")
        for subcommand, flags in words.flags.items():
            seen = f"__fish_seen_subcommand_from {name}"
            seen += f"; and __fish_seen_subcommand_from {subcommand}" if subcommand else ""
            lines += [f"complete -c clt -n '{seen}' -l {flag.removeprefix('--')}" for flag in flags]
    return "\n".join(lines) + "\n"
