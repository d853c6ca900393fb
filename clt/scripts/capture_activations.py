"""vlm-clt-training's capture, with its flags and files; `clt generate` stores each MLP output only once.

    python scripts/capture_activations.py --model llava-hf/llava-1.5-7b-hf --dataset queries.json --image_dir images \\
      --output_dir ./my_activations --n_targets 16

Each MLP output is written once per layer that predicts it, as the seed does, up to n_targets times.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from clt.activation_generation.corpus import host_path
from clt.activation_generation.layer_capture import capture_layer_files
from clt.data.vlm_datasets import MultimodalDataset
from clt.errors import ConfigError
from clt.lm import ModelAdapter
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
    """Gets L0/, L1/, ...; must not hold another capture."""
    n_targets: int = 16
    """Following layers stored per layer, where they exist."""
    max_samples: int | None = None
    """Take only the first so many; None: all."""
    batch_size: int = 1
    """Samples per forward pass."""
    device: str | None = None
    """Torch device; None: a GPU if there is one."""


def main(options: Options) -> None:
    """Capture and say what was written."""
    for name in ("batch_size", "max_samples", "n_targets"):
        value = cast(int | None, getattr(options, name))
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1.")
    samples = MultimodalDataset(options.dataset, options.image_dir, options.max_samples)
    adapter = ModelAdapter.from_pretrained(host_path(options.model), device=choose_device(options.device))
    if not adapter.is_multimodal:
        raise ConfigError(f"{options.model} sees no images. Use a vision-language model, or `clt generate` for text.")
    folder = Path(options.output_dir)
    n_files = capture_layer_files(
        adapter,
        [samples[place] for place in range(len(samples))],
        folder,
        n_targets=options.n_targets,
        batch_size=options.batch_size,
    )
    print(f"{len(samples)} samples, {adapter.n_layers - 1} layers with targets, {n_files} file pairs each: {folder}")
