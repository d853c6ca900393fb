"""Where features fire most in a corpus: examples for graphs in the browser and for `clt explain`.

clt examples --model gpt2 --clt runs/gpt2 --dataset corpus.jsonl --output runs/gpt2/examples
clt examples --model world:shapes --clt runs/demo/clt/run --dataset world:shapes --output examples --features 0:12 3:400
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from clt import worlds
from clt.activation_generation.corpus import is_world, placed_image
from clt.config.base import Config, require_positive
from clt.data.corpora import Corpus
from clt.discovery.corpus_examples import CorpusExamples, parse_features
from clt.discovery.examples import write_examples
from clt.errors import ConfigError, DatasetError
from clt.lm import ModelAdapter
from clt.progress import progress_bar
from clt.replacement.loading import open_pair
from clt.scripts.plans import transcoder_line
from clt.types import Sample


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """Host, transcoder, corpus, and how much is kept."""

    model: Annotated[str, tyro.conf.arg(aliases=("--model-name",))]
    """Hugging Face id or local folder of the host, or world:NAME."""
    clt: Annotated[str, tyro.conf.arg(aliases=("--transcoder",))]
    """Folder of the transcoder."""
    dataset: Annotated[str, tyro.conf.arg(aliases=("--data",))]
    """Samples: .txt, .jsonl (text, or prompt + image + answer), .parquet, a Hub id, or world:NAME."""
    output: Annotated[Path, tyro.conf.arg(aliases=("--out", "-o"))]
    """Folder for one JSON file per feature, and for images that lie in no file."""
    features: tuple[str, ...] = ()
    """Only these, as LAYER:FEATURE; none: all that fire."""
    per_feature: int = 8
    """Examples per feature."""
    context: int | None = 64
    """Tokens shown before the strongest one, half as many behind it; None: the whole sample."""
    samples: int | None = None
    """Read only the first so many; None: all (2,000 of a world)."""
    dataset_split: str = "train"
    """Split of a Hugging Face data set."""
    text_column: str = "text"
    """Column (or JSONL key) that holds the text."""
    batch_size: int = 16
    """Samples per forward pass."""
    dtype: str | None = None
    """Type the host runs in; None: as saved."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""

    def __post_init__(self) -> None:
        require_positive(
            "examples",
            per_feature=self.per_feature,
            context=self.context,
            samples=self.samples,
            batch_size=self.batch_size,
        )


def plan(options: Options) -> dict[str, Any]:
    """What would be read and written."""
    parse_features(options.features)
    what = f"{options.samples or 'all'} samples of {options.dataset}"
    read = [f"the host {options.model}", transcoder_line(options.clt), what]
    return {"read": read, "write": [str(options.output)]}


def main(options: Options) -> dict[str, Any]:
    """Read the corpus and write the examples; gives how many."""
    chosen = parse_features(options.features) or None
    adapter, transcoder = open_pair(options.model, options.clt, {"device": options.device, "dtype": options.dtype})
    found = CorpusExamples(adapter, transcoder.to(adapter.device), chosen, options.per_feature)
    with progress_bar(options.samples, "examples", "samples", fleeting=True) as bar:
        n_read = found.read(corpus(options, adapter), options.batch_size, bar.update)
    if not n_read:
        raise DatasetError(f"{options.dataset} holds no samples.")
    n_features = write_examples(options.output, found.records(str(Path(options.clt).resolve()), options.context))
    n_pictures = found.save_pictures(options.output)
    print(f"examples of {n_features:,} features from {n_read:,} samples: {options.output}")
    print(f"clt attribute ... --html page.html --features {options.output} shows them.")
    return {"folder": str(options.output), "n_features": n_features, "n_samples": n_read, "n_pictures": n_pictures}


def corpus(options: Options, adapter: ModelAdapter) -> Iterator[Sample]:
    """The samples, prompts as the host takes them.

    Raises:
        ConfigError: a world without a host.
    """
    if is_world(options.dataset):
        world = worlds.load(options.dataset.removeprefix("world:"))
        if not isinstance(world, worlds.HostedWorld):
            raise ConfigError(f"{options.dataset} has no samples for a host. `world:shapes` has.")
        return iter(world.samples("held_out", options.samples or 2000))
    samples = Corpus(path=options.dataset, split=options.dataset_split, text_column=options.text_column)
    return (placed_image(sample, adapter) for sample in itertools.islice(samples, options.samples))
