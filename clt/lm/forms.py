"""How a question becomes a prompt: as it stands, by the host's chat template, or in LLaVA-1.5's own words."""

from __future__ import annotations

from typing import Any, Literal

from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from clt.errors import HostModelError

PromptForm = Literal["auto", "raw", "chat", "llava-hf", "llava-original"]
"""auto: the chat template if the host has one, else raw. raw: the text itself, image placeholders in front if it has
none. llava-hf: the template of the llava-hf checkpoints. llava-original: that of the LLaVA-1.5 repository."""

# The system text of the conversation template `vicuna_v1`, which LLaVA-1.5 was evaluated with.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def written(
    text: str,
    n_images: int,
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
) -> str:
    """The prompt, with one placeholder per image.

    A text that holds placeholders already is a finished prompt and stays as it is.

    Raises:
        HostModelError: the host has no chat template, or no placeholder for images.
    """
    template = tokenizer.chat_template if processor is None else processor.chat_template
    placeholder = None if processor is None else getattr(processor, "image_token", None)
    if n_images and placeholder is None:
        raise HostModelError(f"There are {n_images} image(s), but the host has no placeholder to put in their place.")
    if placeholder is not None and placeholder in text:
        return text
    if form == "chat" and template is None:
        raise HostModelError("The host has no chat template. Write the prompt in full (form 'raw').")
    pictures = f"{placeholder}\n" * n_images
    match form:
        case "llava-hf":
            return f"USER: {pictures}{text} ASSISTANT:"
        case "llava-original":
            return f"{VICUNA} USER: {pictures}{text} ASSISTANT:"
        case "raw":
            return pictures + text
        case _:
            return pictures + text if template is None else _templated(text, n_images, tokenizer, processor)


def _templated(text: str, n_images: int, tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin | None) -> str:
    options: Any = {"add_generation_prompt": True, "tokenize": False}
    if processor is None:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": text}], **options))
    content: Any = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], **options))


def padded_to_square(image: Image.Image, processor: ProcessorMixin) -> Image.Image:
    """The image in the middle of a square in the processor's mean colour, as the original LLaVA-1.5 does.

    The llava-hf processors cut a square out of the middle instead, which sees other pixels of anything not square.
    """
    if image.width == image.height:
        return image
    mean = getattr(processor.image_processor, "image_mean", None)  # pyright: ignore[reportAttributeAccessIssue]
    # Truncated, not rounded: so does the original.
    colour = tuple(int(255 * channel) for channel in mean) if mean else (0, 0, 0)
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
