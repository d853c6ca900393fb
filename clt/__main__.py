"""The `clt` command: finds the subcommand's module, parses its dataclass, runs its `main`.

Only the chosen command's module is imported, so `clt --help` needs no torch. A command is a module in
`clt.scripts` with a dataclass `Options` (each field a flag) and a function `main(options)`.
"""

import difflib
import importlib
import keyword
import os
import sys
import types

from clt import __version__
from clt.errors import CLTError, ConfigError

COMMANDS = {
    "Start here": {
        "demo": "The whole job on the embedded vision-language model: a report in runs/demo/.",
        "doctor": "What this machine has, what is missing for which feature, and whether a host is supported.",
        "completion": "Print the completion script of a shell: bash, zsh or fish.",
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
        "plan": "On paper: memory and time of a training run on some devices, and whether it fits.",
        "train": "Train a cross-layer transcoder on captured activations.",
        "sweep": "Train several configurations on one pass over the data; draw EV over L0.",
        "evaluate": "Error, explained variance, L0 and dead features on held-out activations.",
        "checkpoint": "Checkpoints of several ranks: info, merge into one piece, split into parts.",
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
        "examples": "Where features fire most in a corpus, for graphs in the browser and for explain.",
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

Examples:
  clt demo --quick
  clt generate --model gpt2 --dataset texts.jsonl --target-total-tokens 2000000 --dry-run
  clt train    --data activations/gpt2/texts_train --output-dir runs/gpt2 --num-features 3072
  clt train    --config runs/gpt2/run.json --output-dir runs/gpt2-seed-1 --seed 1
  clt fidelity --model gpt2 --clt runs/gpt2 --dataset held_out.jsonl --json

Flags may be written with - or _. Every command takes --dry-run, --json, --config FILE and --debug.
Exit codes: 0 done; 2 asked for something that cannot be (one message, no traceback); 130 stopped with Ctrl-C;
1 a mistake in crosslayer itself. The documentation is in docs/ of the source.
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

    from clt.progress import announce_retries

    announce_retries()
    preset = take_preset(name, arguments)
    if preset is not None:
        module = importlib.import_module(f"clt.scripts.{preset}")
        module.main(module.parse(arguments))
        return
    module = importlib.import_module(f"clt.scripts.{module_name(name)}")
    if name in LAUNCHERS:
        module.main(tyro.cli(module.Options, prog=f"clt {name}", description=module.__doc__, args=arguments))
        return
    from clt.scripts.invoke import run_module

    run_module(module, name, arguments)


def report_mistake(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
    """What stands on the screen instead of the traceback of an error that nobody foresaw."""
    last = traceback
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f" ({last.tb_frame.f_code.co_filename}:{last.tb_lineno})" if last is not None else ""
    advice = "This is a mistake in crosslayer, not in what you asked for. --debug shows all of it; please report it."
    if kind.__name__ == "OutOfMemoryError":
        advice = "The device's memory is full: take a smaller batch (or --micro-batch-tokens), or another --dtype."
    sys.stderr.write(f"clt: {kind.__name__}: {error}{where}\n{advice}\n")


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
    if not debug:
        sys.excepthook = report_mistake
    name, rest = arguments[0], arguments[1:]
    names = [command for commands in COMMANDS.values() for command in commands]
    if name not in (*names, *LAUNCHERS):
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean `clt {close[0]}`?" if close else ""
        sys.stderr.write(f"clt: no command {name!r}.{hint} `clt --help` lists them.\n")
        sys.exit(2)
    run_guarded(name, rest, debug)


def run_guarded(name: str, arguments: list[str], debug: bool) -> None:
    """Run a command; what it refuses is one message and exit code 2."""
    rank = os.environ.get("RANK", "0")
    try:
        run(name, arguments)
    except CLTError as error:
        if debug:
            raise
        sys.stderr.write(f"clt {name}{'' if rank == '0' else f' (rank {rank})'}: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == "0":  # of several processes, all of which are stopped
            sys.stderr.write(f"\nclt {name}: stopped. The same command goes on from the last saved point.\n")
        # Worker threads of torch may still hold the interpreter; 130 is what a shell expects after Ctrl-C.
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has seen enough (`clt data info ... | head`); nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"clt {name}: {os.strerror(error.errno) if error.errno else error}{where}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
