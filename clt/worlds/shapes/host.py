"""The shapes world's host before training: a real LLaVA of two thirds of a million parameters.

CLIP vision tower (patches of 16 pixels: one per cell), the usual two-layer projector, a Llama decoder of four layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from clt.worlds.shapes import text
from clt.worlds.shapes.scene import CELL_SIZE, COLOURS, IMAGE_SIZE, KINDS, N_CELLS
from clt.worlds.tokens import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, train_tokenizer
from clt.worlds.weights import initialise, match_queries_to_keys

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}\n{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class HostSize:
    """Sizes of the host; the defaults are those of the shipped one."""

    vision_width: int = 128
    vision_layers: int = 2
    vision_ffn: int = 384
    width: int = 64
    layers: int = 4
    heads: int = 4
    ffn: int = 172


def make_processor() -> LlavaProcessor:
    """Tokenizer and image processor, in the layout `AutoProcessor` reads."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=train_tokenizer(_vocabulary_texts()),
        patch_size=CELL_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _vocabulary_texts() -> list[str]:
    """Every word the world uses, in every place it is used."""
    questions = [text.prompt(text.asking_for(kind)) + answer for kind in KINDS for answer in (" Yes", " No")]
    listed = [text.with_article(f"{colour} {kind}") for colour in COLOURS for kind in KINDS]
    captions = [f" There is {one}, {two} and {one}." for one, two in zip(listed, reversed(listed))]
    return [*questions, text.prompt(text.DESCRIBE), *captions]


def make_model(size: HostSize, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """An untrained host whose initial weights are a function of the seed."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.vision_width,
            intermediate_size=size.vision_ffn,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=CELL_SIZE,
            projection_dim=size.vision_width,
        ),
        text_config=LlamaConfig(
            hidden_size=size.width,
            intermediate_size=size.ffn,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        ),
        image_token_index=IMAGE_ID,
        image_seq_length=N_CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    initialise(model, seed, n_layers={"vision_tower": size.vision_layers, "language_model": size.layers})
    match_queries_to_keys(model.model.language_model.layers)
    return model


def image_features(
    model: LlavaForConditionalGeneration, pixel_values: Float[Tensor, "image channel height width"]
) -> Float[Tensor, "image patch d_model"]:
    """What the decoder sees of each image: the vision tower's patches (no class token), projected."""
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    return model.model.multi_modal_projector(hidden[-1][:, 1:])
