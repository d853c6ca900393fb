"""Train a cross-layer transcoder on captured activations.

The number of layers and their width come from the data. An interrupted run goes on when the same command is given
again, or with --resume alone. Example:

    clt train --data activations/gpt2/pile_train --output-dir runs/gpt2 --num-features 3072
    clt train --resume runs/gpt2
    torchrun --nproc-per-node 4 -m clt train --data activations/gpt2/pile_train --output-dir runs/gpt2

With --fidelity-interval N --fidelity-dataset FILE, the host also runs with the transcoder in place of its MLPs, every N
steps (`fidelity/...` in metrics.jsonl).
With --preset eleuther, the transcoder is described by EleutherAI's option names: clt train --preset eleuther --help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from clt.config import CLTConfig, ParallelConfig, TrainingConfig
from clt.config.base import Config
from clt.config.training_config import BOOKKEEPING
from clt.data.stores import BaseActivationStore, LocalActivationStore
from clt.errors import ConfigError
from clt.parallel.mesh import Mesh, open_mesh
from clt.scripts.probe import fidelity_probe
from clt.training.run_folder import RunFolder
from clt.training.setup import open_store, origin_of
from clt.training.trainer import CLTTrainer
from clt.types import ActivationBatch

# Stand for the data's own sizes while flags are parsed; `main` puts the real ones in.
UNKNOWN_LAYERS, UNKNOWN_WIDTH = 1_000_000, 1_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Data, transcoder, training."""

    output_dir: Annotated[str, tyro.conf.arg(aliases=("--output",))] = "runs/clt"
    """Folder of the run: result, metrics, checkpoints."""
    resume: Annotated[str | None, tyro.conf.arg(aliases=("--resume-from-checkpoint-dir",))] = None
    """Go on with the run in this folder; its options come from its run.json, and only bookkeeping may be changed."""
    resume_step: int | None = None
    """Go back to the checkpoint of this step; later checkpoints are deleted. None: the newest."""
    held_out: str | None = None
    """Folder of held-out activations; by default `held_out` beside a training folder called `train`."""
    server_token: str | None = None
    """Token of the activation server; better kept out of sight in CLT_SERVER_TOKEN. Never written to the run."""
    device: str | None = None
    """Torch device; default: a GPU if there is one."""
    clt: Annotated[CLTConfig, tyro.conf.arg(name="")] = CLTConfig(
        num_features=4096, num_layers=UNKNOWN_LAYERS, d_model=UNKNOWN_WIDTH
    )
    """What to train."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig()
    """How to train it."""
    parallel: Annotated[ParallelConfig, tyro.conf.arg(name="")] = ParallelConfig()
    """On how many ranks: `torchrun --nproc-per-node 4 -m clt train ...` starts them."""


_NO_OPTIONS = Options()


def split_folders(data: str, held_out: str | None = None) -> tuple[Path, Path | None]:
    """The training folder and the held-out one, given either the training folder or the folder above both."""
    root = Path(data)
    train = root / "train" if (root / "train").is_dir() else root
    beside = train.parent / "held_out"
    if held_out is not None:
        return train, Path(held_out)
    return train, beside if train.name == "train" and beside.is_dir() else None


def held_out_batches(
    folder: Path | None, tokens: int, like: BaseActivationStore
) -> Callable[[], Iterable[ActivationBatch]] | None:
    """A function that reads every held-out token once, in batches.

    Raises:
        ConfigError: they are of another host than those to train on (`like`).
    """
    if folder is None:
        return None
    store = LocalActivationStore(folder, batch_size_tokens=tokens)
    held_out, train = (store.n_layers, store.d_model), (like.n_layers, like.d_model)
    if held_out != train:
        raise ConfigError(
            f"The held-out activations in {folder} have (layers, d_model) = {held_out}, those to train on {train}. "
            "They are of different hosts: give --held-out a folder that was captured from the same one."
        )
    return store.one_pass


def options_of_run(options: Options) -> Options:
    """The options with which the run in `options.resume` was begun, with today's bookkeeping.

    Raises:
        ConfigError: there is no run, or an option that decides the result was given with another value.
    """
    assert options.resume is not None
    record = RunFolder(options.resume).record()
    if record is None:
        raise ConfigError(f"{options.resume} holds no run: it has no run.json. Give the --output-dir of a `clt train`.")
    asked = record["options"]
    clt = _recorded(options.clt, _NO_OPTIONS.clt, CLTConfig.from_dict(asked["clt"]), frozenset())
    training = _recorded(
        options.training, _NO_OPTIONS.training, TrainingConfig.from_dict(asked["training"]), BOOKKEEPING
    )
    held_out = options.held_out or asked.get("held_out")
    return replace(options, output_dir=options.resume, held_out=held_out, clt=clt, training=training)


def _recorded(given: Config, default: Config, recorded: Config, free: frozenset[str]) -> Any:
    """The recorded options, where a flag did not change one that is free to change."""
    changes, refused = {}, []
    for name in (field.name for field in fields(given) if field.name not in ("num_layers", "d_model")):
        value, old = getattr(given, name), getattr(recorded, name)
        if value in (getattr(default, name), old):
            continue
        if name in free:
            changes[name] = value
        else:
            refused.append(f"  {name}: {old!r} there, {value!r} asked for now")
    if refused:
        raise ConfigError("The run that is to go on was begun with other options:\n" + "\n".join(refused))
    return recorded.replace(**changes)


def fitted(config: CLTConfig, training: TrainingConfig, store: BaseActivationStore) -> CLTConfig:
    """The transcoder asked for, with what the data say: layers, width, host and hookpoints."""
    named = {name: value for name, value in origin_of(store).items() if getattr(config, name) is None}
    sizes = {"num_layers": store.n_layers, "d_model": store.d_model}
    return config.replace(**sizes, **named, expected_input_dtype=training.activation_dtype)


@dataclass(frozen=True)
class Settled:
    """Options with what the data decide: layers, width, host, and where held-out activations lie."""

    clt: CLTConfig
    training: TrainingConfig
    store: BaseActivationStore
    held_out: Path | None


def settle(options: Options) -> Settled:
    """Open the activations and fill in what they decide.

    Raises:
        ConfigError: no activations were named.
        DatasetError: they cannot be read.
    """
    training, held_out = options.training, None if options.held_out is None else Path(options.held_out)
    if training.activation_source == "local_manifest":
        if training.activation_path is None:
            raise ConfigError("Which activations? Give --data FOLDER, a folder that `clt generate` wrote.")
        train, held_out = split_folders(training.activation_path, options.held_out)
        training = training.replace(activation_path=str(train))
    store = open_store(training, options.server_token)
    return Settled(fitted(options.clt, training, store), training, store, held_out)


def open_trainer(options: Options, mesh: Mesh | None = None) -> CLTTrainer:
    """The trainer that the options describe, on the data they name."""
    settled = settle(options)
    return CLTTrainer(
        settled.clt,
        settled.training,
        options.output_dir,
        options.device,
        store=settled.store,
        held_out=held_out_batches(settled.held_out, settled.training.train_batch_size_tokens, settled.store),
        fidelity=fidelity_probe(settled.training, settled.clt, options.device),
        resume_step=options.resume_step,
        details={"held_out": None if settled.held_out is None else str(settled.held_out)},
        mesh=mesh,
        parallel=options.parallel,
    )


def plan(options: Options) -> dict[str, Any]:
    """What would be read, how long it is, and where the result goes."""
    if options.resume is not None:
        options = options_of_run(options)
    settled, folder = settle(options), RunFolder(options.output_dir)
    config, training = settled.clt, settled.training
    tokens = training.training_steps * training.train_batch_size_tokens
    every = training.fidelity_interval
    in_host = [] if every is None else [f"in its host every {every:,} steps on {training.fidelity_dataset}"]
    there = "the run is finished, nothing to do" if folder.is_finished else "a run is there, to be gone on with"
    return {
        "read": [f"{training.activation_path}: {config.num_layers} layers of {config.d_model}"],
        "measure": [f"on {settled.held_out}" if settled.held_out else "on nothing held out", *in_host],
        "train": [
            f"{config.num_layers} x {config.num_features:,} features, {config.activation_fn}",
            f"{training.training_steps:,} steps x {training.train_batch_size_tokens:,} = {tokens:,} tokens",
        ],
        "write": [f"{options.output_dir} ({there if folder.record() else 'new'})"],
    }


def main(options: Options) -> dict[str, Any] | None:
    """Train, evaluate on the held-out split if there is one, and say where the result is."""
    parallel = options.parallel
    with open_mesh(parallel.tp, parallel.dp, options.device, parallel.timeout_seconds) as mesh:
        done = _run(options, mesh)
        return done if mesh.is_main else None


def _run(options: Options, mesh: Mesh) -> dict[str, Any]:
    """The run, on every rank; the first one speaks."""
    say = print if mesh.is_main else _say_nothing
    if options.resume is not None:
        options = options_of_run(options)
    trainer = open_trainer(options, mesh)
    steps = trainer.config.training_steps
    if trainer.was_finished:
        say(f"{options.output_dir} already holds this run, finished. Delete the folder to train again.")
        return {"folder": options.output_dir, **(trainer.folder.record() or {}).get("summary", {})}
    if not mesh.is_alone:
        say(f"{mesh.size} ranks: --tp {mesh.tp.size} (parts of the dictionary) x --dp {mesh.dp.size} (copies).")
    if trainer.step:
        say(f"Going on from step {trainer.step} of {steps}.")
    trainer.train()
    say(f"Transcoder in {options.output_dir} (cfg.json, clt.safetensors; metrics.jsonl).")
    done: dict[str, Any] = {"folder": options.output_dir, **(trainer.folder.record() or {}).get("summary", {})}
    if trainer.held_out is not None:
        result = trainer.evaluate()
        done["held_out"] = result.to_dict()
        say(
            f"Held out, {result.n_tokens:,} tokens: NMSE {result.nmse:.4f} (EV {result.explained_variance:.4f}), "
            f"L0 {result.l0:.1f} per layer, dead {result.dead_share:.2%}."
        )
    return done


def _say_nothing(_: str) -> None:
    """What the other ranks would say, the first one says."""
