"""The data sets of vlm-clt-training under their own names: captured files of one layer, and images with queries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from clt.data.corpora import PROMPT_KEYS
from clt.data.layer_files import LayerFiles
from clt.errors import DatasetError
from clt.types import Sample


class VLMActivationDataset(
    Dataset[tuple[Float[Tensor, "sample position d_model"], Float[Tensor, "sample position target d_model"]],]
):
    """The file pairs of one layer: what its MLP read and what the following MLPs wrote.

    Args:
        activations_dir: holds L0, L1, ...
        layer: which of them.
        cached_files: pairs kept in memory.
    """

    def __init__(self, activations_dir: str | Path, layer: int, cached_files: int = 50) -> None:
        self._files = LayerFiles(Path(activations_dir) / f"L{layer}", cached_files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(
        self, index: int
    ) -> tuple[Float[Tensor, "sample position d_model"], Float[Tensor, "sample position target d_model"]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._files.read(index)


class MultimodalDataset(Dataset[Sample]):
    """Queries about images, from a JSON list (or JSON lines) of objects with `image` and `query`.

    Args:
        dataset: the JSON file.
        image_dir: where its images are.
        max_samples: take only the first so many.

    Raises:
        DatasetError: the file is missing or no such list, a record lacks a query or an image, or an image is missing.
    """

    def __init__(self, dataset: str | Path, image_dir: str | Path, max_samples: int | None = None) -> None:
        path, images = Path(dataset), Path(image_dir)
        if not images.is_dir():
            raise DatasetError(f"The image folder {images} does not exist.")
        records = _records(path)[:max_samples]
        self._samples = [_sample(f"{path.name}:{number}", record, images) for number, record in enumerate(records)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def _records(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except FileNotFoundError:
        raise DatasetError(f"The queries {path} do not exist.") from None
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise DatasetError(f'{path} must be a JSON list, not empty: [{{"image": "a.jpg", "query": "..."}}, ...].')
    return records


def _sample(name: str, record: object, images: Path) -> Sample:
    if not isinstance(record, Mapping) or not isinstance(record.get("image"), str):
        raise DatasetError(f"{name} names no image. Each record needs `image` (a file in {images}) and `query`.")
    prompt = next((record[key] for key in PROMPT_KEYS if isinstance(record.get(key), str)), None)
    if prompt is None:
        raise DatasetError(f"{name} has no query (looked for {', '.join(PROMPT_KEYS)}). It has: {', '.join(record)}.")
    image = images / record["image"]
    if not image.is_file():
        raise DatasetError(f"{name}: its image {image} does not exist.")
    return Sample(id=name, prompt=prompt, images=(image,), meta=record)
