"""Train a transcoder further through the replacement model: on the logits of the host with all its MLPs replaced.

clt finetune --transcoder runs/gpt2 --model gpt2 --data texts.jsonl --output runs/gpt2-kl --loss kl --steps 200

The transcoder should be trained already (`clt train`). The same command goes on with an interrupted run. Writes the
transcoder, metrics.jsonl and finetune.json (before and after, on samples that are not trained on).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from clt import worlds
from clt.activation_generation.corpus import is_world, open_model, placed_image
from clt.config.base import require_positive, write_text_atomically
from clt.data.corpora import Corpus
from clt.errors import ConfigError, DatasetError
from clt.lm import ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from clt.replacement.fidelity import teacher_forced
from clt.replacement.finetune import FinetuneConfig, Finetuner
from clt.scripts.invoke import plain
from clt.scripts.plans import transcoder_line
from clt.training.evaluator import evaluate
from clt.types import Sample


@dataclass(frozen=True, kw_only=True)
class Options:
    """Host, transcoder, samples, and how to train."""

    model: Annotated[str, tyro.conf.arg(aliases=("--model-name",))]
    """Hugging Face id or local folder of the host, or world:NAME."""
    transcoder: Annotated[str, tyro.conf.arg(aliases=("--clt",))]
    """Folder of the transcoder to start from; it is left as it is."""
    data: Annotated[str, tyro.conf.arg(aliases=("--dataset",))]
    """Samples: .txt, .jsonl (text, or prompt + image + answer), .parquet, a Hub id, or world:NAME."""
    output: str
    """Folder for the result and the checkpoints."""
    held_out: str | None = None
    """Samples to measure on; None: those of `data` that come after the ones trained on."""
    dataset_split: str = "train"
    """Split of a Hugging Face data set."""
    text_column: str = "text"
    """Column (or JSONL key) that holds the text."""
    samples: int = 2000
    """How many samples to train on."""
    held_out_samples: int = 64
    """How many samples to measure on."""
    text_words: int = 200
    """Text without an answer is cut after this many words."""
    finetune: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = FinetuneConfig()
    """How to train."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type the host runs in; None: as saved."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""

    def __post_init__(self) -> None:
        require_positive(
            "finetune", samples=self.samples, held_out_samples=self.held_out_samples, text_words=self.text_words
        )


def samples_of(options: Options, adapter: ModelAdapter) -> tuple[list[Sample], list[Sample]]:
    """Those to train on and those to measure on.

    Raises:
        DatasetError: nothing is left to measure on.
    """
    if options.held_out is not None:
        train = _read(options.data, "train", options.samples, options, adapter)
        return train, _read(options.held_out, "held_out", options.held_out_samples, options, adapter)
    if is_world(options.data):
        train = _read(options.data, "train", options.samples, options, adapter)
        return train, _read(options.data, "held_out", options.held_out_samples, options, adapter)
    every = _read(options.data, "train", options.samples + options.held_out_samples, options, adapter)
    if len(every) <= options.held_out_samples:
        raise DatasetError(
            f"{options.data} has {len(every)} samples, which --held-out-samples {options.held_out_samples} uses up. "
            "Lower it, or give --held-out FILE."
        )
    return every[: -options.held_out_samples], every[-options.held_out_samples :]


def _read(path: str, split: Literal["train", "held_out"], n: int, options: Options, adapter: ModelAdapter) -> list:
    """The first n samples of a corpus, long texts cut."""
    if is_world(path):
        world = worlds.load(path.removeprefix("world:"))
        if not isinstance(world, worlds.HostedWorld):
            raise ConfigError(f"{path} has no samples for a host. `world:shapes` has.")
        return world.samples(split, n)
    corpus = Corpus(path=path, split=options.dataset_split, text_column=options.text_column)
    samples = [_cut(placed_image(sample, adapter), options.text_words) for sample in itertools.islice(corpus, n)]
    if not samples:
        raise DatasetError(f"{path} holds no samples.")
    return samples


def _cut(sample: Sample, words: int) -> Sample:
    if sample.answer is not None or sample.images:
        return sample
    return replace(sample, prompt=" ".join(sample.prompt.split(" ")[:words]))


def measure(replacement: ReplacementModel, samples: Sequence[Sample], rows: int) -> dict[str, float]:
    """KL, cross-entropy and agreement over all text positions; NMSE and L0 on the host's own activations."""
    sums = teacher_forced(replacement, samples, rows).text
    total = float(sums["n"].sum())
    if total == 0:
        raise DatasetError(f"None of the {len(samples)} held-out samples has a text token to predict.")
    adapter, model = replacement.adapter, replacement.transcoder
    assert isinstance(model, CrossLayerTranscoder)
    batches = (adapter.capture(adapter.prepare(samples[i : i + rows])) for i in range(0, len(samples), rows))
    own = evaluate(model, batches)
    means = {name: float(sums[name].sum()) / total for name in ("kl", "ce_host", "ce_replacement", "top1")}
    return {**means, "nmse": own.nmse, "l0": own.l0, "positions": total}


def plan(options: Options) -> dict[str, Any]:
    """What would be read and written."""
    samples = f"{options.samples:,} samples of {options.data}"
    return {
        "read": [f"the host {options.model}", transcoder_line(options.transcoder), samples],
        "train": [f"{options.finetune.steps:,} steps of {options.finetune.rows} samples"],
        "write": [options.output],
    }


def main(options: Options) -> dict[str, Any]:
    """Fine-tune, write, and print before and after."""
    if Path(options.output).resolve() == Path(options.transcoder).resolve():
        raise ConfigError(f"--output {options.output} is the transcoder to start from. Choose another folder.")
    adapter = open_model(options.model, dtype=options.dtype, device=options.device)
    transcoder = CrossLayerTranscoder.from_pretrained(options.transcoder, adapter.device)
    replacement = ReplacementModel(adapter, transcoder)
    train, held_out = samples_of(options, adapter)
    before = measure(replacement, held_out, options.finetune.rows)
    details = {"model": options.model, "transcoder": options.transcoder, "data": options.data}
    run = Finetuner(replacement, train, options.finetune, options.output, details)
    if run.folder.is_finished:
        print(f"{options.output} already holds this run, finished. Delete the folder to train again.")
        return {"folder": options.output, **json.loads((Path(options.output) / "finetune.json").read_text())}
    if run.step:
        print(f"Going on from step {run.step} of {options.finetune.steps}.")
    run.train()
    after = measure(replacement, held_out, options.finetune.rows)
    report = {"before": before, "after": after, "held_out_samples": len(held_out), "options": plain(options)}
    write_text_atomically(Path(options.output) / "finetune.json", json.dumps(report, indent=2) + "\n")
    view = Table(title=f"{len(held_out)} samples not trained on, {before['positions']:,.0f} positions")
    for column in ("measure", "before", "after"):
        view.add_column(column, justify="left" if column == "measure" else "right")
    for name in before:
        if name != "positions":
            view.add_row(name, f"{before[name]:.4f}", f"{after[name]:.4f}")
    Console().print(view)
    print(f"Transcoder in {options.output} (cfg.json, clt.safetensors; metrics.jsonl, finetune.json).")
    return {"folder": options.output, **report}
