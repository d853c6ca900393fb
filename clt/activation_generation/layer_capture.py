"""Images and queries shown to a host, written in the per-layer files of vlm-clt-training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clt.activation_generation.corpus import placed_image
from clt.data.layer_files import LayerFileWriter
from clt.lm import ModelAdapter
from clt.types import Sample


def capture_layer_files(
    adapter: ModelAdapter, samples: Sequence[Sample], folder: Path, *, n_targets: int, batch_size: int
) -> int:
    """Write `L{l}/batch_{i}_{x,y}.pt` and return how many pairs each layer has.

    Args:
        adapter: the host.
        samples: prompts without the host's chat markup, which is added, with real line breaks.
        n_targets: following layers per layer.
        batch_size: samples per forward pass.

    Raises:
        HostModelError: an image cannot be read; the message names file and sample.
        DatasetError: the folder is in use or the disk is full.
    """
    writer = LayerFileWriter(folder, n_targets)
    for start in range(0, len(samples), batch_size):
        batch = [placed_image(samples[place], adapter) for place in range(start, min(start + batch_size, len(samples)))]
        writer.append(adapter.capture(adapter.prepare(batch)))
    return writer.n_files
