"""The `clt` command: finds the subcommand's module, parses its dataclass, runs its `main`.

Only the chosen command's module is imported, so `clt --help` needs no torch. A command is a module in
`clt.scripts` with a dataclass `Options` (each field a flag) and a function `main(options)`.
"""

import difflib
import importlib
import keyword
import os
import sys

from clt import __version__
from clt.errors import CLTError, ConfigError

COMMANDS = {
    "Start here": {
        "demo": "The whole job on the embedded vision-language model: a report in runs/demo/.",
    },
    "Activations": {
        "generate": "Capture what a host's MLPs read and write, to disk.",
        "data": "Look after data sets: info, verify, statistics, drop a chunk, convert.",
        "scramble": "Write a data set again with its rows in a random order.",
        "serve": "Serve activations to other machines, or attribution graphs to a browser.",
    },
    "Benchmarks": {
        "bench": "Benchmarks of vision-language models: list, info, verify, score.",
    },
    "Discovery": {
        "discover": "Benchmark to steering: all phases in a row, skipping what is up to date.",
        "phase": "One phase: capture, evaluate, classify, analyze, visualize, map, steer, attribute.",
        "apply-neurons": "Fold a neuron patch into a plain host and save it.",
    },
    "Transcoders": {
        "train": "Train a cross-layer transcoder on captured activations.",
        "sweep": "Train several configurations on one pass over the data; draw EV over L0.",
        "evaluate": "Error, explained variance, L0 and dead features on held-out activations.",
        "convert": "Turn a TopK or BatchTopK transcoder into JumpReLU and report what changed.",
        "finetune": "Train a transcoder further through the replacement model, on its logits.",
        "import": "Write another project's transcoder as ours: circuit-tracer, SAELens, EleutherAI, ...",
        "export": "Write a transcoder in another project's format.",
        "push": "Put a transcoder, with a model card, on the Hugging Face Hub.",
        "analyze-theta": "The thresholds of a transcoder in a few numbers per layer.",
        "fidelity": "Put the transcoder in place of the MLPs and measure how faithful the host stays.",
        "steer": "Change features while the host answers: text and next tokens before and after.",
    },
    "Graphs": {
        "attribute": "Compute an attribution graph: what made the model say it.",
        "faithfulness": "Hold attribution graphs to worlds with known circuits and to real effects.",
        "explain": "Label features from their examples; graphs in the browser show the labels.",
    },
}

# Only for the scripts of the seed projects in scripts/, which keep their own flags; not in the table above.
LAUNCHERS = (
    *("train-clt", "train-layer", "convert-batchtopk-to-jumprelu"),
    *("capture-activations", "upload-activations-to-hf"),
)

# Other projects' options for a command of ours: `clt train --preset eleuther`. These modules parse for themselves.
PRESETS = {("train", "eleuther"): "train_eleuther"}

HELP = """usage: clt COMMAND [options]        clt COMMAND --help        clt --version

Cross-layer transcoders for language and vision-language models.

{groups}

Flags may be written with - or _. An error prints one message and exits with 2; --debug shows where it came from.
"""


def help_text() -> str:
    """The command table, grouped."""
    groups = (
        f"{title}:\n" + "\n".join(f"  {name:<13} {line}" for name, line in commands.items())
        for title, commands in COMMANDS.items()
    )
    return HELP.format(groups="\n\n".join(groups))


def take_preset(name: str, arguments: list[str]) -> str | None:
    """Take `--preset NAME` out of the arguments; the module that parses the others, None without it."""
    for place, word in enumerate(arguments):
        flag, _, value = word.partition("=")
        if flag != "--preset":
            continue
        del arguments[place]
        if not value and place < len(arguments):
            value = arguments.pop(place)
        if (name, value) not in PRESETS:
            known = ", ".join(f"`clt {command} --preset {preset}`" for command, preset in PRESETS)
            raise ConfigError(f"--preset {value}: there is no such preset of `clt {name}`. There is: {known}.")
        return PRESETS[name, value]
    return None


def module_name(command: str) -> str:
    """The module of a command in clt/scripts; `import` cannot be one's name as it is."""
    return command.replace("-", "_") + "_" * keyword.iskeyword(command)


def run(name: str, arguments: list[str]) -> None:
    """Parse the arguments into the command's Options and call its main."""
    import tyro

    preset = take_preset(name, arguments)
    if preset is not None:
        module = importlib.import_module(f"clt.scripts.{preset}")
        module.main(module.parse(arguments))
        return
    module = importlib.import_module(f"clt.scripts.{module_name(name)}")
    module.main(tyro.cli(module.Options, prog=f"clt {name}", description=module.__doc__, args=arguments))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `clt` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return
    if arguments[0] == "--version":
        sys.stdout.write(f"crosslayer {__version__}\n")
        return
    name, rest = arguments[0], arguments[1:]
    names = [command for commands in COMMANDS.values() for command in commands]
    if name not in (*names, *LAUNCHERS):
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean `clt {close[0]}`?" if close else ""
        sys.stderr.write(f"clt: no command {name!r}.{hint} `clt --help` lists them.\n")
        sys.exit(2)
    try:
        run(name, rest)
    except CLTError as error:
        if debug:
            raise
        sys.stderr.write(f"clt {name}: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nclt {name}: stopped. The same command goes on from the last saved point.\n")
        # Worker threads of torch may still hold the interpreter; 130 is what a shell expects after Ctrl-C.
        sys.exit(130)
    except OSError as error:
        if debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"clt {name}: {os.strerror(error.errno) if error.errno else error}{where}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
