"""Tokenising samples: prompts as the tokenizer or processor wants them, answers as their continuation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from clt.errors import HostModelError
from clt.lm.forms import padded_to_square
from clt.lm.inputs import Row
from clt.lm.loading import quietly
from clt.types import Sample


def text_prompts(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
    """One `input_ids [position]` per prompt."""
    for sample in samples:
        if sample.images:
            raise HostModelError(
                f"Sample {sample.id!r} has {len(sample.images)} image(s), but the host sees none. Use a "
                "vision-language model (and pass its processor), or leave the images out."
            )
    encoded = tokenizer([sample.prompt for sample in samples])["input_ids"]
    return [
        _tidy({"input_ids": torch.tensor(ids, dtype=torch.long)}, tokenizer, sample)
        for ids, sample in zip(encoded, samples)
    ]


def image_prompts(
    processor: ProcessorMixin, samples: Sequence[Sample], image_token_id: int | None, pads_images: bool = False
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Per-position tensors of each prompt with its images' placeholders expanded, and the pixels of all."""
    images: Any = [[open_image(image, sample) for image in sample.images] for sample in samples]
    if pads_images:
        images = [[padded_to_square(image, processor) for image in row] for row in images]
    try:
        prompts = [sample.prompt for sample in samples]
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
        with quietly():
            batch = processor(text=prompts, images=images if any(images) else None, **options)
    except (ValueError, IndexError, StopIteration) as error:
        raise HostModelError(
            f"The processor refused samples {_few(samples)}: {error}\n"
            "Most often a prompt does not hold one image placeholder (such as <image>) per image."
        ) from error
    per_position, whole = _split_by_shape(batch)
    masks = per_position.pop("attention_mask").bool()
    rows = [
        _tidy({name: tensor[row][masks[row]] for name, tensor in per_position.items()}, processor.tokenizer, sample)
        for row, sample in enumerate(samples)
    ]
    for row, sample in zip(rows, samples):
        _check_placeholders(row["input_ids"], sample, image_token_id)
    return rows, whole


def answer_tokens(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Tensor:
    """The answer's ids as they continue the prompt; empty if there is no answer.

    The prompt and the prompt with its answer are tokenised and compared, so that the answer starts as it would in
    running text. Where a token would span the border, the answer is tokenised alone.
    """
    if not sample.answer:
        return torch.zeros(0, dtype=torch.long)
    texts = [sample.prompt, sample.prompt + sample.answer]
    prompt, both = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if both[: len(prompt)] == prompt:
        return torch.tensor(both[len(prompt) :], dtype=torch.long)
    return torch.tensor(tokenizer(sample.answer, add_special_tokens=False)["input_ids"], dtype=torch.long)


# How a model marks tokens that are read from left to right, where 0 means another thing: PaliGemma reads its prompt
# (token type 0) in both directions and what follows (1) in one; with 0 an answer would see its own later tokens.
_ANSWER_TYPES = {"paligemma": {"token_type_ids": 1}}


def extended(row: Mapping[str, Tensor], answer: Tensor, model_type: str = "") -> Row:
    """A prompt with its answer behind it, in what the model says about its positions: text, read from left to right."""
    answer = answer.cpu().long()
    types = _ANSWER_TYPES.get(model_type, {})
    tensors = {
        name: torch.cat(
            [tensor, answer if name == "input_ids" else tensor.new_full((len(answer),), types.get(name, 0))]
        )
        for name, tensor in row.items()
    }
    return Row(tensors, len(answer))


def open_image(image: Image.Image | Path, sample: Sample) -> Image.Image:
    """The image in RGB.

    Raises:
        HostModelError: the file is missing or no image.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise HostModelError(f"Sample {sample.id!r}: its image {image} does not exist.") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise HostModelError(
            f"Sample {sample.id!r}: its image {image} cannot be read ({error}). It is cut off or no image; "
            "replace the file or leave the sample out."
        ) from error


def _split_by_shape(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Integer tensors shaped like the ids belong to positions, the others (pixels, grids) to the batch."""
    shape = batch["input_ids"].shape
    per_position: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in batch.items():
        if name != "labels":
            belongs = tensor.shape == shape and not tensor.is_floating_point()
            (per_position if belongs else whole)[name] = tensor
    return per_position, whole


def _tidy(row: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, sample: Sample) -> dict[str, Tensor]:
    """Without a second BOS (prompts from chat templates bring one) and without an EOS nobody wrote."""
    ids = row["input_ids"].tolist()
    start = 0
    while len(ids) > start + 1 and ids[start] == ids[start + 1] == tokenizer.bos_token_id:
        start += 1
    end = len(ids)
    eos = tokenizer.eos_token
    if end > start + 1 and ids[-1] == tokenizer.eos_token_id and not sample.prompt.rstrip().endswith(str(eos)):
        end -= 1
    return {name: tensor[start:end] for name, tensor in row.items()}


def _check_placeholders(input_ids: Tensor, sample: Sample, image_token_id: int | None) -> None:
    if sample.images and image_token_id is not None and not (input_ids == image_token_id).any():
        raise HostModelError(
            f"Sample {sample.id!r} has {len(sample.images)} image(s), but its prompt holds no image placeholder. Write "
            "one (such as <image>) where each image belongs."
        )


def _few(samples: Sequence[Sample]) -> str:
    return ", ".join(repr(sample.id) for sample in samples[:3]) + (", ..." if len(samples) > 3 else "")
