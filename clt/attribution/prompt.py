"""From a prompt to one row of host inputs, and what each of its positions is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from clt.attribution.graph import Patch, Position
from clt.errors import GraphError
from clt.lm import HostInputs, ModelAdapter
from clt.lm.prompts import open_image
from clt.types import Sample, TokenKind

Prompt = str | Sample | Sequence[int] | HostInputs
"""Text, text with images, token ids, or one row of inputs that is ready."""


def prepare_prompt(adapter: ModelAdapter, prompt: Prompt) -> HostInputs:
    """One row, its answer (if the sample has one) included.

    Plain text gets a first token as circuit-tracer gives it: where the text does not begin with a special token,
    BOS (or else the padding, end or any special token) is put in front, since position 0 is where attention rests.
    """
    if isinstance(prompt, HostInputs):
        return prompt
    if isinstance(prompt, Sample):
        return adapter.prepare([prompt])
    ids = list(prompt) if not isinstance(prompt, str) else _with_first_token(adapter, prompt)
    if not ids:
        raise GraphError("The prompt has no tokens. Give it some text.")
    return adapter.prepare_tokens(torch.tensor([ids]))


def _with_first_token(adapter: ModelAdapter, text: str) -> list[int]:
    if adapter.is_multimodal:
        return adapter.prepare([Sample(id="prompt", prompt=text)]).input_ids[0].tolist()
    tokenizer: Any = adapter.tokenizer
    if tokenizer is None:
        raise GraphError(f"{adapter.name} has no tokenizer, which a text needs. Give token ids instead.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = tokenizer.all_special_ids
    if not special or (ids and ids[0] in special):
        return ids
    named = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, special[0])
    return [next(token for token in named if token is not None), *ids]


def describe_positions(adapter: ModelAdapter, inputs: HostInputs, prompt: Prompt) -> list[Position]:
    """Text, kind and image patch of every position."""
    ids, kinds = inputs.input_ids[0].tolist(), inputs.kind[0].tolist()
    images = images_of(prompt)
    patches = iter(_patches(adapter, inputs, images)) if images else iter(())
    positions = []
    for token, kind in zip(ids, kinds):
        patch = next(patches, None) if kind == TokenKind.IMAGE else None
        positions.append(Position(token, token_text(adapter, token), TokenKind(kind).name.lower(), patch))
    return positions


def images_of(prompt: Prompt) -> list[Image.Image]:
    """The prompt's images in RGB."""
    return [open_image(image, prompt) for image in prompt.images] if isinstance(prompt, Sample) else []


def token_text(adapter: ModelAdapter, token: int) -> str:
    """A token as text; its number where there is no tokenizer."""
    return str(token) if adapter.tokenizer is None else str(adapter.tokenizer.decode([token]))


def _patches(adapter: ModelAdapter, inputs: HostInputs, images: Sequence[Image.Image]) -> Iterator[Patch | None]:
    """One per image token, in order; None where the host's layout of tokens is not a plain grid per image."""
    n_tokens = int((inputs.kind == TokenKind.IMAGE).sum())
    grids = _grids(adapter, inputs, len(images), n_tokens)
    if grids is None:
        return
    for number, (image, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
        left, top, width, height = _seen_area(adapter, image)
        for row in range(rows):
            for column in range(columns):
                x, y = left + width * column / columns, top + height * row / rows
                yield Patch(number, row, column, (x, y, x + width / columns, y + height / rows))


def _grids(adapter: ModelAdapter, inputs: HostInputs, n_images: int, n_tokens: int) -> list[tuple[int, int]] | None:
    """Rows and columns of image tokens of each image."""
    layout = inputs.tensors.get("image_grid_thw")
    if layout is not None:
        # Qwen-VL: patches in time, height and width; `spatial_merge_size` squared of them make one token.
        merge = getattr(getattr(adapter.model.config, "vision_config", None), "spatial_merge_size", 1)
        grids = [(int(h) // merge, int(w) // merge) for _, h, w in layout.tolist()]
    else:
        side = math.isqrt(n_tokens // n_images)
        grids = [(side, side)] * n_images
    return grids if sum(rows * columns for rows, columns in grids) == n_tokens else None


def _seen_area(adapter: ModelAdapter, image: Image.Image) -> tuple[float, float, float, float]:
    """Left, top, width and height, in the image's pixels, of what the host sees of it: all, or the centre."""
    processor: Any = getattr(adapter.processor, "image_processor", None)
    size, crop = getattr(processor, "size", None) or {}, getattr(processor, "crop_size", None) or {}
    if not getattr(processor, "do_center_crop", False) or "shortest_edge" not in size or "height" not in crop:
        return 0.0, 0.0, float(image.width), float(image.height)
    scale = min(image.width, image.height) / size["shortest_edge"]
    width, height = min(crop["width"] * scale, image.width), min(crop["height"] * scale, image.height)
    return (image.width - width) / 2, (image.height - height) / 2, width, height
