"""Which samples a run shows to the host, and which of them are held out."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clt.activation_generation.batches import Split
from clt.activation_generation.packing import HeldOutChoice
from clt.config import ActivationConfig
from clt.data.corpora import BadSampleHandler, Corpus
from clt.errors import ConfigError
from clt.lm import ModelAdapter
from clt.types import Sample

WORLD = "world:"
WORLD_SAMPLES = 2000
"""How many samples a world gives if the options name no number."""


def is_world(path: str) -> bool:
    """Whether a model or a corpus is an embedded world."""
    return path.startswith(WORLD)


def host_path(model_name: str) -> str:
    """What to give to `from_pretrained`."""
    return str(_world(model_name).host_path()) if is_world(model_name) else model_name


def open_model(model_name: str, **options: Any) -> ModelAdapter:
    """The host of a Hub id, a folder or world:NAME, called so in files; options as `ModelAdapter.from_pretrained`."""
    return ModelAdapter.from_pretrained(host_path(model_name), name=model_name, **options)


def model_folder(model_name: str) -> str:
    """The model's part of the data set's folder: a Hub id as it is, a local folder's own name, `world-NAME`."""
    if is_world(model_name):
        return model_name.replace(":", "-")
    return Path(model_name).resolve().name if Path(model_name).is_dir() else model_name


def dataset_folder(dataset_path: str, split: str) -> str:
    """The corpus's part of the data set's folder."""
    if is_world(dataset_path):
        return f"{dataset_path.replace(':', '-')}_{split}"
    path = Path(dataset_path)
    name = path.stem if path.is_file() else os.path.basename(dataset_path.rstrip("/"))
    return f"{name}_{split}"


def samples_of(
    config: ActivationConfig, adapter: ModelAdapter, on_bad_sample: BadSampleHandler | None
) -> Iterator[tuple[Sample, Split]]:
    """Every sample with the split it belongs to, in a fixed order."""
    held_out = HeldOutChoice(config.held_out_fraction, config.seed)
    if is_world(config.dataset_path):
        yield from _world_samples(config, held_out)
        return
    corpus = Corpus(
        path=config.dataset_path,
        split=config.dataset_split,
        text_column=config.dataset_text_column,
        streaming=config.streaming,
        cache_path=config.cache_path,
        image_prompt=config.image_prompt,
        on_bad_sample=on_bad_sample,
    )
    for number, sample in enumerate(itertools.islice(corpus, config.max_samples)):
        yield placed_image(sample, adapter), "held_out" if held_out(number) else "train"


def _world(path: str) -> Any:
    from clt import worlds  # only data sets of a world need them

    world = worlds.load(path.removeprefix(WORLD))
    if not hasattr(world, "samples"):
        raise ConfigError(f"{path} has no host, so there is nothing to capture. `world:shapes` has one.")
    return world


def _world_samples(config: ActivationConfig, held_out: HeldOutChoice) -> Iterator[tuple[Sample, Split]]:
    """A world's own held-out scenes share no seed with its training scenes, so they are what is held out."""
    n = config.max_samples or WORLD_SAMPLES
    splits: list[Split] = ["held_out" if held_out(number) else "train" for number in range(n)]
    world = _world(config.dataset_path)
    streams = {split: iter(world.samples(split, splits.count(split), config.seed)) for split in set(splits)}
    for split in splits:
        # A world of finite text (two-hop) ends earlier in one split than in the other.
        sample = next(streams[split], None)
        if sample is not None:
            yield sample, split


def placed_image(sample: Sample, adapter: ModelAdapter) -> Sample:
    """A prompt for pictures must say where they are; most corpora leave that to the model's chat template."""
    if not sample.images or not adapter.is_multimodal:
        return sample
    return adapter.asked(sample)
