"""vlm-clt-training's capture, with its flags and files; `clt generate` stores each MLP output only once.

    python scripts/capture_activations.py --model llava-hf/llava-1.5-7b-hf --dataset queries.json --image_dir images \\
      --output_dir ./my_activations --n_targets 16

Each MLP output is written once, and the layers that predict it name its file; `--seed-layout` copies it into each of
them, as vlm-clt-training does. The same command started again goes on where it was interrupted.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from clt.activation_generation.corpus import open_model
from clt.activation_generation.layer_capture import capture_layer_files
from clt.data.layer_files import LayerFileWriter
from clt.data.vlm_datasets import MultimodalDataset
from clt.errors import ConfigError
from clt.types import choose_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """The seed's flags."""

    model: str
    """Vision-language model: an id on the Hub, a folder, or world:shapes."""
    dataset: str
    """JSON list of objects with `image` and `query`."""
    image_dir: str
    """Folder of the images."""
    output_dir: str = "./activations"
    """Gets L0/, L1/, ... and targets/; must not hold another capture."""
    n_targets: int = 16
    """Following layers stored per layer, where they exist."""
    max_samples: int | None = None
    """Take only the first so many; None: all."""
    batch_size: int = 1
    """Samples per forward pass."""
    seed_layout: bool = False
    """Copy every target into each file that predicts it, for vlm-clt-training's own programs."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""


def main(options: Options) -> None:
    """Capture and say what was written."""
    for name in ("batch_size", "max_samples", "n_targets"):
        value = cast(int | None, getattr(options, name))
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1.")
    samples = MultimodalDataset(options.dataset, options.image_dir, options.max_samples)
    folder = Path(options.output_dir)
    writer = LayerFileWriter(folder, options.n_targets, _plan(options, samples), seed_layout=options.seed_layout)
    if writer.is_finished:
        print(f"{folder} is already finished with these options; nothing to do.")
        return
    adapter = open_model(options.model, device=choose_device(options.device))
    if not adapter.is_multimodal:
        raise ConfigError(f"{options.model} sees no images. Use a vision-language model, or `clt generate` for text.")
    chosen = [samples[place] for place in range(len(samples))]
    capture_layer_files(adapter, chosen, writer, batch_size=options.batch_size)
    n_layers = adapter.n_layers - 1
    print(f"{len(samples)} samples, {n_layers} layers with targets, {writer.n_files} file pairs each: {folder}")


def _plan(options: Options, samples: MultimodalDataset) -> dict[str, str | int]:
    """What must agree for a capture to be gone on with."""
    queries = json.dumps([(samples[place].id, samples[place].prompt) for place in range(len(samples))])
    return {
        "model": options.model,
        "image_dir": options.image_dir,
        "batch_size": options.batch_size,
        "queries_sha256": hashlib.sha256(queries.encode()).hexdigest(),
    }
