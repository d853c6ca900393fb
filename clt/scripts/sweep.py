"""Train several configurations side by side on one pass over the data, and draw explained variance over L0.

    clt sweep --data activations/stories --output-dir runs/sweep --activation-fn topk --topk-k 16 \\
        --vary topk_k=8,16,32 n_targets=None,1

Every value of one `--vary` entry is combined with every value of the others. An interrupted sweep goes on when the same
command is given again. Writes sweep.json, frontier.png and one run folder per configuration.
"""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from clt.config import CLTConfig, TrainingConfig
from clt.config.base import write_text_atomically
from clt.errors import ConfigError
from clt.scripts import train
from clt.scripts.plans import record_options
from clt.scripts.probe import fidelity_probe
from clt.training.setup import open_store
from clt.training.shared_store import SharedRead, SharedView
from clt.training.trainer import CLTTrainer
from clt.viz.training_plots import frontier, save

# What all runs must share, because they share the batches.
_SHARED = ("training_steps", "train_batch_size_tokens", "seed", "activation_path", "activation_dtype")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every run, and what varies."""

    run: Annotated[train.Options, tyro.conf.arg(name="")] = field(default_factory=train.Options)
    """What the runs have in common."""
    vary: tuple[str, ...] = ()
    """NAME=VALUE,VALUE,... of any option of `clt train`; all combinations are trained."""


def variants(vary: Sequence[str]) -> list[dict[str, Any]]:
    """All combinations of the values, as changes of options.

    Raises:
        ConfigError: an entry is no NAME=VALUES, or names something that cannot vary.
    """
    known = {f.name for cls in (CLTConfig, TrainingConfig) for f in fields(cls)} - set(_SHARED)
    choices = []
    for entry in vary:
        name, _, values = entry.replace("-", "_", entry.partition("=")[0].count("-")).partition("=")
        if name not in known or not values:
            raise ConfigError(
                f"--vary {entry!r}: expected NAME=VALUE,VALUE,... with an option of `clt train` other than "
                f"{', '.join(_SHARED)}, which all runs share."
            )
        choices.append([(name, _value(text)) for text in values.split(",")])
    return [dict(combination) for combination in itertools.product(*choices)]


def _value(text: str) -> Any:
    """A number, None, True or False as such; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def name_of(changes: Mapping[str, Any]) -> str:
    """The folder of a variant."""
    return "_".join(f"{key}={value}" for key, value in changes.items()) or "base"


def options_of(base: train.Options, changes: Mapping[str, Any]) -> train.Options:
    """The common options with one variant's changes."""
    clt = {key: value for key, value in changes.items() if key in CLTConfig.__dataclass_fields__}
    training = {key: value for key, value in changes.items() if key not in clt}
    folder = str(Path(base.output_dir) / name_of(changes))
    return replace(base, output_dir=folder, clt=base.clt.replace(**clt), training=base.training.replace(**training))


def family_of(config: CLTConfig) -> str:
    """The line of the frontier that a transcoder belongs to."""
    window = "PLT" if (config.first_target, config.span) == (0, 1) else "CLT"
    return f"{window} {config.activation_fn}"


def train_together(trainers: Sequence[CLTTrainer]) -> None:
    """Step the runs in turn, those behind first; if one is interrupted, all write a checkpoint."""
    running = {id(trainer): trainer.steps() for trainer in trainers}
    left = list(trainers)
    try:
        while left:
            behind = min(left, key=lambda trainer: trainer.step)
            if next(running[id(behind)], None) is None:
                left.remove(behind)
    except BaseException:
        for trainer in left:
            running[id(trainer)].close()
            if 0 < trainer.step < trainer.config.training_steps:
                trainer.checkpoints.save()
        raise


def run(options: Options) -> list[dict[str, Any]]:
    """Train all variants and measure each on all held-out tokens."""
    base = options.run
    if base.training.activation_path is None:
        raise ConfigError("Which activations? Give --data FOLDER, a folder that `clt generate` wrote.")
    train_folder, held_out = train.split_folders(base.training.activation_path, base.held_out)
    if held_out is None:
        raise ConfigError("A sweep compares held-out errors. Give --held-out FOLDER.")
    training = base.training.replace(activation_path=str(train_folder))
    shared = SharedRead(open_store(training))
    batches = train.held_out_batches(held_out, training.train_batch_size_tokens, shared.store)
    changes = variants(options.vary)
    trainers = []
    for index, change in enumerate(changes):
        one = options_of(replace(base, training=training), change)
        config = train.fitted(one.clt, one.training, shared.store)
        trainers.append(
            CLTTrainer(
                config,
                one.training,
                one.output_dir,
                base.device,
                store=SharedView(shared),
                held_out=batches,
                fidelity=fidelity_probe(one.training, config, base.device),
                shows_progress=index == 0,
            )
        )
    train_together(trainers)
    results = []
    for change, trainer in zip(changes, trainers, strict=True):
        measured = trainer.evaluate().to_dict()
        identity = {"name": name_of(change), "family": family_of(trainer.clt_config), "changes": change}
        results.append({**identity, "folder": str(trainer.folder.path), **measured})
    return results


def plan(options: Options) -> dict[str, Any]:
    """What would be trained, on what."""
    common = train.plan(options.run)
    names = [name_of(change) for change in variants(options.vary)]
    steps = common["train"][1]
    return {**common, "train": [f"{len(names)} runs of {steps}, on one pass over the data", *names]}


def main(options: Options) -> list[dict[str, Any]]:
    """Sweep, write sweep.json and frontier.png, print a table."""
    results = run(options)
    folder = Path(options.run.output_dir)
    record_options(folder, options)
    write_text_atomically(folder / "sweep.json", json.dumps(results, indent=2) + "\n")
    points: dict[str, list[tuple[str, float, float]]] = {}
    view = Table(title=f"{results[0]['n_tokens']:,} held-out tokens")
    for column in ("configuration", "family", "L0", "EV", "NMSE", "dead"):
        view.add_column(column, justify="left" if column in ("configuration", "family") else "right")
    for row in results:
        points.setdefault(row["family"], []).append((row["name"], row["l0"], row["explained_variance"]))
        numbers = (f"{row['l0']:.1f}", f"{row['explained_variance']:.4f}", f"{row['nmse']:.4f}")
        view.add_row(row["name"], row["family"], *numbers, f"{row['dead_share']:.2%}")
    save(frontier(points), folder / "frontier.png")
    Console().print(view)
    print(f"{folder / 'sweep.json'}, {folder / 'frontier.png'}")
    return results
