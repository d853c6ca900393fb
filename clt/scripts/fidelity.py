"""Put a transcoder in place of a host's MLPs and measure how faithful the host stays, on held-out text or pictures.

clt fidelity --model gpt2 --clt runs/gpt2 --dataset held_out.jsonl --show 3
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from clt import worlds
from clt.activation_generation.corpus import host_path, is_world, placed_image
from clt.config.base import Config, require_positive, write_text_atomically
from clt.data.corpora import Corpus
from clt.errors import ConfigError, DatasetError
from clt.lm import ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from clt.replacement.fidelity import FidelityReport, measure_fidelity
from clt.types import Sample


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """Host, transcoder, held-out samples."""

    model: Annotated[str, tyro.conf.arg(aliases=("--model-name",))]
    """Hugging Face id or local folder of the host, or world:NAME."""
    clt: str
    """Folder of the transcoder (`cfg.json`, `clt.safetensors`)."""
    dataset: Annotated[str, tyro.conf.arg(aliases=("--data",))]
    """Held-out samples: .txt, .jsonl (text, or prompt + image + answer), .parquet, a Hub id, or world:NAME."""
    dataset_split: str = "test"
    """Split of a Hugging Face data set."""
    text_column: str = "text"
    """Column (or JSONL key) that holds the text."""
    samples: int = 100
    """How many samples."""
    prompt_words: int = 16
    """Text without an answer is cut after this many words: the first part prompts, the rest is the answer."""
    answer_words: int = 100
    """Longest answer taken from such a text."""
    max_new_tokens: int = 48
    """Length of the freely generated answers."""
    batch_size: int = 16
    """Samples per forward pass."""
    first_n_layers: int | None = None
    """Replace only the first so many MLPs; None: all."""
    show: int = 2
    """Print this many generated texts of host and replacement side by side."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type the host runs in; None: as saved."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""
    output: str | None = None
    """JSON file for the result; None: `fidelity.json` beside the transcoder."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        require_positive(
            "fidelity",
            samples=self.samples,
            prompt_words=self.prompt_words,
            answer_words=self.answer_words,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )


def held_out_samples(options: Options, adapter: ModelAdapter) -> list[Sample]:
    """The samples to measure on, each with a prompt and an answer."""
    if is_world(options.dataset):
        world = worlds.load(options.dataset.removeprefix("world:"))
        if not isinstance(world, worlds.HostedWorld):
            raise ConfigError(f"{options.dataset} has no samples for a host. `world:shapes` has.")
        return world.samples("held_out", options.samples)
    corpus = Corpus(path=options.dataset, split=options.dataset_split, text_column=options.text_column)
    cut = (prompt_and_answer(placed_image(sample, adapter), options) for sample in corpus)
    samples = list(itertools.islice((sample for sample in cut if sample.answer), options.samples))
    if not samples:
        raise DatasetError(
            f"{options.dataset} has no text longer than --prompt-words {options.prompt_words}, so nothing is left to "
            "predict. Lower --prompt-words or give longer texts."
        )
    return samples


def prompt_and_answer(sample: Sample, options: Options) -> Sample:
    """Cut plain text in two; a sample that has an answer stays as it is."""
    if sample.answer is not None or sample.images:
        return sample
    words = sample.prompt.split(" ")
    prompt, rest = words[: options.prompt_words], words[options.prompt_words :][: options.answer_words]
    answer = " " + " ".join(rest) if rest else None
    return Sample(id=sample.id, prompt=" ".join(prompt), answer=answer, meta=sample.meta)


def table(report: FidelityReport) -> Table:
    """One row per measure with its interval and number of positions."""
    view = Table(title="Replacement beside the host (95 % bootstrap interval over samples)")
    for column in ("measure", "value", "interval", "positions"):
        view.add_column(column, justify="left" if column == "measure" else "right")
    for name, measure in report.measures().items():
        low, high = measure.interval
        view.add_row(name, f"{measure.value:.4f}", f"{low:.4f} to {high:.4f}", f"{measure.n:,}")
    return view


def main(options: Options) -> None:
    """Measure, write the JSON, print it or a table and some texts."""
    adapter = ModelAdapter.from_pretrained(host_path(options.model), dtype=options.dtype, device=options.device)
    transcoder = CrossLayerTranscoder.from_pretrained(options.clt, adapter.device)
    replacement = ReplacementModel(adapter, transcoder, first_n_layers=options.first_n_layers)
    samples = held_out_samples(options, adapter)
    report = measure_fidelity(
        replacement, samples, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
    )
    text = json.dumps({"options": options.to_dict(), **report.to_dict()}, indent=2)
    write_text_atomically(Path(options.output or Path(options.clt) / "fidelity.json"), text + "\n")
    if options.json:
        print(text)
        return
    Console().print(table(report))
    shown = samples[: options.show]
    answers = [
        model.generate(shown, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
        for model in (adapter, replacement)
    ]
    for sample, host, replaced in zip(shown, *answers, strict=True):
        print(f"\n     prompt | {sample.prompt}")
        print(f"       host | {host.strip()}")
        print(f"replacement | {replaced.strip()}")
