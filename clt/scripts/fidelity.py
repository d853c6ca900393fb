"""Put a transcoder in place of a host's MLPs and measure how faithful the host stays, on held-out text or pictures.

clt fidelity --model gpt2 --clt runs/gpt2 --dataset held_out.jsonl --show 3
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from clt import worlds
from clt.activation_generation.corpus import is_world, placed_image
from clt.config.base import Config, require_positive, write_text_atomically
from clt.data.corpora import Corpus
from clt.errors import ConfigError, DatasetError
from clt.lm import ModelAdapter
from clt.models import BaseTranscoder
from clt.replacement import ReplacementModel
from clt.replacement.compare import MEAN, by_layers, compare, layer_counts
from clt.replacement.fidelity import measure_fidelity
from clt.replacement.loading import open_pair
from clt.scripts.plans import transcoder_line
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
    compare: tuple[str, ...] = ()
    """Further transcoders to measure beside it, as NAME=FOLDER or FOLDER; the MLPs at their mean come along."""
    by_layers: bool = False
    """Also measure with the first 1, 2, ... MLPs replaced (at most 8 numbers, evenly spread)."""
    plot: str | None = None
    """PNG for the figure; None: beside the JSON when --compare or --by-layers is given."""
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


def named(options: Options) -> dict[str, str]:
    """Folder of each transcoder by its name; the first is the one of --clt."""
    given: dict[str, str] = {}
    for text in (options.clt, *options.compare):
        name, folder = _name_and_folder(text)
        if name in given or name == MEAN:
            raise ConfigError(f"Two transcoders are called {name!r}. Name them: --compare NAME={folder}.")
        given[name] = folder
    return given


def _name_and_folder(text: str) -> tuple[str, str]:
    """NAME=FOLDER or FOLDER; the folders of `clt sweep` have equals signs in their names."""
    name, _, folder = text.partition("=")
    if not folder or Path(text).exists():
        return Path(text).resolve().name, text
    return name, folder


def measure(
    options: Options, adapter: ModelAdapter, transcoders: dict[str, BaseTranscoder], samples: list[Sample]
) -> dict[str, Any]:
    """The report of --clt at the top, and what else was asked for under `models` and `by_layers`."""
    how: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    if options.compare:
        models = compare(adapter, transcoders, samples, **how)
    else:
        [(name, transcoder)] = transcoders.items()
        replacement = ReplacementModel(adapter, transcoder, first_n_layers=options.first_n_layers)
        models = {name: measure_fidelity(replacement, samples, **how)}
    result: dict[str, Any] = {**next(iter(models.values())).to_dict()}
    if options.compare:
        result["models"] = {name: report.to_dict() for name, report in models.items()}
    if options.by_layers:
        result["by_layers"] = {
            name: {
                str(count): report.to_dict()
                for count, report in by_layers(
                    adapter, transcoder, samples, counts_for(ReplacementModel(adapter, transcoder)), **how
                ).items()
            }
            for name, transcoder in transcoders.items()
        }
    return result


def counts_for(replacement: ReplacementModel) -> list[int]:
    """Numbers of first layers to replace; a transcoder without a say in layer 0 starts later."""
    return layer_counts(replacement.adapter.n_layers, first=min(replacement.layers) + 1)


def draw(result: dict[str, Any], path: Path) -> None:
    """The figure, if there is more than one thing to compare."""
    from clt.viz.fidelity_plots import fidelity_by_layers, fidelity_side_by_side
    from clt.viz.training_plots import save

    if "by_layers" in result:
        counts = {name: {int(n): each for n, each in reports.items()} for name, reports in result["by_layers"].items()}
        save(fidelity_by_layers(counts), path)
    elif "models" in result:
        save(fidelity_side_by_side(result["models"]), path)


def tables(result: dict[str, Any]) -> list[Table]:
    """The measures with intervals and counts, one column per replacement; by number of layers, one row per number."""
    models = result.get("models", {"value": result})
    view = Table(title="Replacement beside the host (95 % bootstrap interval over samples)")
    for column in ("measure", *models, "positions"):
        view.add_column(column, justify="left" if column == "measure" else "right")
    first = next(iter(models.values()))
    for name in (key for key, each in first.items() if isinstance(each, dict) and "interval" in each):
        cells = [_cell(model.get(name)) for model in models.values()]
        view.add_row(name, *cells, f"{first[name]['n']:,}")
    found = [view]
    for name, reports in result.get("by_layers", {}).items():
        rows = Table(title=f"{name} by number of MLPs replaced")
        for column in ("MLPs", *_BY_LAYERS):
            rows.add_column(column, justify="right")
        for count, report in reports.items():
            rows.add_row(count, *(_cell(report.get(measure)) for measure in _BY_LAYERS))
        found.append(rows)
    return found


_BY_LAYERS = ("kl", "ce_increase", "top1", "token_match")


def _cell(measure: dict[str, Any] | None) -> str:
    if measure is None:
        return "-"
    low, high = measure["interval"]
    return f"{measure['value']:.4f} [{low:.4f}, {high:.4f}]"


def plan(options: Options) -> dict[str, Any]:
    """What would be read and written."""
    transcoders = [transcoder_line(folder) for folder in named(options).values()]
    what = f"{options.samples} samples of {options.dataset}"
    return {"read": [f"the host {options.model}", *transcoders, what], "write": [str(output_of(options))]}


def output_of(options: Options) -> Path:
    """The JSON file; the figure goes beside it."""
    return Path(options.output or Path(next(iter(named(options).values()))) / "fidelity.json")


def main(options: Options) -> None:
    """Measure, write JSON and figure, print tables and some texts."""
    folders = named(options)
    if options.first_n_layers is not None and (options.compare or options.by_layers):
        raise ConfigError("--first-n-layers goes with one transcoder alone, without --compare and --by-layers.")
    host_options = {"dtype": options.dtype, "device": options.device}
    main_name = next(iter(folders))
    adapter, first = open_pair(options.model, folders[main_name], host_options)
    others = {name: open_pair(adapter, folder, {})[1] for name, folder in folders.items() if name != main_name}
    transcoders = {name: each.to(adapter.device) for name, each in {main_name: first, **others}.items()}
    samples = held_out_samples(options, adapter)
    result = measure(options, adapter, transcoders, samples)
    output = output_of(options)
    text = json.dumps({"options": options.to_dict(), **result}, indent=2)
    write_text_atomically(output, text + "\n")
    draw(result, Path(options.plot) if options.plot else output.with_suffix(".png"))
    if options.json:
        print(text)
        return
    console = Console()
    for table in tables(result):
        console.print(table)
    show_texts(options, samples[: options.show], adapter, ReplacementModel(adapter, transcoders[main_name]))


def show_texts(options: Options, samples: list[Sample], adapter: ModelAdapter, replacement: ReplacementModel) -> None:
    """Some answers of host and replacement, one below the other."""
    answers = [
        model.generate(samples, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
        for model in (adapter, replacement)
    ]
    for sample, host, replaced in zip(samples, *answers, strict=True):
        print(f"\n     prompt | {sample.prompt}")
        print(f"       host | {host.strip()}")
        print(f"replacement | {replaced.strip()}")
