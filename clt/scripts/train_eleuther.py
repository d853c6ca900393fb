"""`clt train --preset eleuther`: EleutherAI's clt-training options on this project's trainer.

    clt train --preset eleuther --data activations/gpt2/pile_train --cross_layer 12 --k 16 --expansion_factor 8
    clt train --preset eleuther --theirs checkpoints/run/layers.0.mlp/cfg.json --data activations/gpt2/pile_train

Shape, sparsity and tying are given in their names, with their defaults; the training options are ours. Differences that
no option expresses: activations come from disk instead of a running host, and later layers' scales start above zero.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from clt.config import TrainingConfig, eleuther_config
from clt.config.eleuther import EleutherOptions
from clt.errors import ConfigError
from clt.scripts import train
from clt.training.setup import open_store

_SWITCHES = {field.name for field in fields(EleutherOptions) if isinstance(field.default, bool)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Data, their transcoder, our training."""

    output_dir: Annotated[str, tyro.conf.arg(aliases=("--output",))] = "runs/clt"
    """Folder of the run; `clt train --resume` goes on with it."""
    held_out: str | None = None
    """Folder of held-out activations; by default `held_out` beside a training folder called `train`."""
    device: str | None = None
    """Torch device; default: a GPU if there is one."""
    theirs: str | None = None
    """JSON of their options (their cfg.json, with or without d_in); flags go before it."""
    clt: Annotated[EleutherOptions, tyro.conf.arg(name="")] = EleutherOptions()
    """What to train."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig()
    """How to train it."""


def parse(arguments: Sequence[str]) -> Options:
    """Flags over the JSON file over their defaults; switches as they write them, `--skip_connection=True`.

    Raises:
        ConfigError: the file has an option that is not theirs.
    """
    arguments = _switched(arguments)
    file = next((after for word, after in itertools.pairwise(arguments) if word == "--theirs"), None)
    default = Options() if file is None else Options(clt=EleutherOptions.from_dict(_read(file)[0]))
    return tyro.cli(Options, default=default, prog="clt train --preset eleuther", description=__doc__, args=arguments)


def _switched(arguments: Sequence[str]) -> list[str]:
    """`--name=True`, `--name True`, `--theirs=FILE` as tyro wants them: `--name` or `--no-name`, `--theirs FILE`."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    switched: list[str] = []
    for word in words:
        name = switched[-1].removeprefix("--").replace("-", "_") if switched else ""
        if name in _SWITCHES and word in ("True", "true", "False", "false"):
            prefix = "--" if word.lower() == "true" else "--no-"
            switched[-1] = prefix + name
        else:
            switched.append(word)
    return switched


def _read(file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Their options in a JSON file, and what it says of the host's size."""
    try:
        values = json.loads(Path(file).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON (line {error.lineno}: {error.msg}). Was it cut off?") from None
    sizes = {name: values.pop(name) for name in ("d_in", "d_model", "num_layers") if name in values}
    return values, {"d_model" if name == "d_in" else name: value for name, value in sizes.items()}


def main(options: Options) -> None:
    """Open the data for the host's size, put their options in ours, and train as `clt train` does."""
    training = options.training
    if training.activation_source == "local_manifest":
        if training.activation_path is None:
            raise ConfigError("Which activations? Give --data FOLDER, a folder that `clt generate` wrote.")
        data, _ = train.split_folders(training.activation_path)
        training = training.replace(activation_path=str(data))
    store = open_store(training)
    host = {"num_layers": store.n_layers, "d_model": store.d_model}
    for name, value in ({} if options.theirs is None else _read(options.theirs)[1]).items():
        if value != host[name]:
            raise ConfigError(f"{options.theirs} is for {name} = {value}, but the activations have {host[name]}.")
    config = eleuther_config({**options.clt.to_dict(), **host})
    train.main(
        train.Options(
            output_dir=options.output_dir, held_out=options.held_out, device=options.device, clt=config,
            training=options.training,
        )
    )  # fmt: skip
