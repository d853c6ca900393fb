"""Tiny random vision-language hosts of many families, with their real processors; no files, no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from clt.lm import ModelAdapter
from clt.types import Sample
from tests.tiny_hosts import _GATED, WIDTH, tiny_image, tiny_tokenizer

SIZE = {"height": 28, "width": 28}


def relaxed(kind: type[ProcessorMixin]) -> Any:
    """The processor without its demand for a video processor, which needs torchvision."""

    def accept(self: ProcessorMixin, name: str, argument: Any) -> None:
        return None

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": accept})


def text_shape(**more: Any) -> dict[str, Any]:
    """The text model's part of a configuration; the vocabulary leaves room for the families' own tokens."""
    return {**_GATED, **more}


def siglip() -> SiglipVisionConfig:
    """Four patches, no class token."""
    return SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )


def llava_next() -> tuple[PreTrainedConfig, ProcessorMixin]:
    """An overview and crops of the picture, unpadded to its own shape."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    points = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_shape()),
        image_token_index=3,
        vision_feature_layer=-1,
        image_grid_pinpoints=points,
    )
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIZE, image_grid_pinpoints=points)
    processor = LlavaNextProcessor(
        images,
        tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor


def qwen2_5_vl() -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Patches of any number, positions in three dimensions."""
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = tiny_tokenizer(names, image_token="<|image_pad|>", video_token="<|video_pad|>")
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    rope = {"type": "mrope", "mrope_section": [1, 1, 0], "rope_theta": 10000.0, "rope_type": "default"}
    config = Qwen2_5_VLConfig(
        text_config=text_shape(rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
        tie_word_embeddings=False,
    )
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84)
    return config, relaxed(Qwen2_5_VLProcessor)(images, tokenizer, video_processor=None)


def gemma3_vision() -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Attention in both directions within an image; a norm behind each MLP."""
    tokenizer = tiny_tokenizer(
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text_shape(sliding_window=64)),
        vision_config=siglip(),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size=SIZE, do_pan_and_scan=False)
    return config, Gemma3Processor(images, tokenizer, image_seq_length=4)


def paligemma() -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Prompt and image are read in both directions, the answer from left to right."""
    images = SiglipImageProcessorPil(size=SIZE)
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tiny_tokenizer())
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**text_shape(vocab_size=1500)),
        vision_config=siglip(),
        image_token_index=3,
        projection_dim=WIDTH,
    )
    return config, processor


_CROPS = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))


def idefics3(kind: type[PreTrainedConfig] = Idefics3Config) -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Several crops and an overview, with tokens for rows and columns between them."""
    names = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_CROPS)
    config = kind(
        text_config=LlamaConfig(**text_shape(vocab_size=400)).to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_id=3,
        scale_factor=2,
        pad_token_id=2,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return config, Idefics3Processor(images, tiny_tokenizer(names), image_seq_len=1)


def internvl() -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Four patches shuffled into one token."""
    names = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tokenizer = tiny_tokenizer(
        names,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [28, 28],
            "patch_size": [14, 14],
        },
        text_config=Qwen2Config(**text_shape()).to_dict(),
        image_token_id=tokenizer.context_image_token_id,
        downsample_ratio=0.5,
    )
    images = GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=False)
    return config, relaxed(InternVLProcessor)(images, tokenizer, video_processor=None, image_seq_length=1)


VLMS: dict[str, Callable[[], tuple[PreTrainedConfig, ProcessorMixin]]] = {
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "gemma3_vision": gemma3_vision,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3(SmolVLMConfig),
    "internvl": internvl,
}
PLACEHOLDERS = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3_vision": "<start_of_image>",
    "internvl": "<IMG_CONTEXT>",
}


def vlm_model(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model; norms and gates that start at zero would make layers invisible, so nothing stays there."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def vlm_adapter(family: str, dtype: torch.dtype = torch.float32) -> ModelAdapter:
    """An adapter on a random host of one of the families above."""
    config, processor = VLMS[family]()
    return ModelAdapter(vlm_model(config, dtype=dtype), processor=processor, name=f"tiny-{family}")


def vlm_samples(family: str) -> list[Sample]:
    """Prompts of different lengths, each with an image and an answer."""
    placeholder = PLACEHOLDERS.get(family, "<image>")
    texts = [("a b", "cde"), ("hello there you", "ok"), ("xyz", "a longer answer")]
    return [
        Sample(id=f"s{i}", prompt=f"{placeholder}U: {prompt} A:", answer=answer, images=(tiny_image(i),))
        for i, (prompt, answer) in enumerate(texts)
    ]
