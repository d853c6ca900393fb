"""Images and queries shown to a host, written in the per-layer files of vlm-clt-training."""

from __future__ import annotations

from collections.abc import Sequence

from clt.activation_generation.corpus import placed_image
from clt.data.layer_files import LayerFileWriter
from clt.lm import ModelAdapter
from clt.types import Sample


def capture_layer_files(
    adapter: ModelAdapter, samples: Sequence[Sample], writer: LayerFileWriter, *, batch_size: int
) -> None:
    """Write the samples that the writer does not have yet.

    Args:
        adapter: the host.
        samples: prompts without the host's chat markup, which is added, with real line breaks.
        writer: of a new capture, or of one that was interrupted and had the same samples.
        batch_size: samples per forward pass.

    Raises:
        HostModelError: an image cannot be read; the message names file and sample.
        DatasetError: the folder is in use or the disk is full.
    """
    for start in range(writer.samples, len(samples), batch_size):
        batch = [placed_image(samples[place], adapter) for place in range(start, min(start + batch_size, len(samples)))]
        writer.append(adapter.capture(adapter.prepare(batch)))
    writer.finish()
