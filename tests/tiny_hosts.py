"""Tiny random hosts of many families, built from their configurations in a moment; no files, no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from clt.config import CLTConfig
from clt.lm import ModelAdapter
from clt.models import BaseTranscoder
from clt.types import Sample

VOCABULARY = 300
SPECIAL = ("<s>", "</s>", "<pad>", "<image>")
WIDTH = 16
N_LAYERS = 3

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    # Random weights of the usual size make nearly constant logits; these make every layer matter.
    "initializer_range": 0.3,
}
_GATED: dict[str, Any] = {**_SHAPE, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4}

TEXT_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**_SHAPE),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE, intermediate_size=24),
    "llama": lambda: LlamaConfig(**_GATED),
    "qwen2": lambda: Qwen2Config(**_GATED),
    "qwen3": lambda: Qwen3Config(**_GATED),
    "gemma2": lambda: Gemma2Config(**_GATED),
    "gemma3": lambda: Gemma3TextConfig(**_GATED),
    "phi": lambda: PhiConfig(**_SHAPE, intermediate_size=24),
    "mixtral": lambda: MixtralConfig(**_GATED, num_local_experts=3, num_experts_per_tok=2),
}
"""Families whose MLPs are found by structure."""

MLP_PATHS = {
    "gpt2": "transformer.h.{}.mlp",
    "gpt_neox": "gpt_neox.layers.{}.mlp",
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "mixtral"), "model.layers.{}.mlp"),
    "llava": "model.language_model.layers.{}.mlp",
}

OPT_TEMPLATES = {
    "input_template": "model.decoder.layers.{}.fc1",
    "output_template": "model.decoder.layers.{}.fc2",
}


def opt_model() -> PreTrainedModel:
    """A family without an MLP module: it needs templates."""
    config = OPTConfig(**{**_SHAPE, "init_std": _SHAPE["initializer_range"]}, ffn_dim=24, word_embed_proj_dim=WIDTH)
    return from_config(config)


def from_config(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_tokenizer(more: tuple[str, ...] = (), **names: str) -> PreTrainedTokenizerFast:
    """One token per byte; BOS in front; `<image>` is one token, and so are `more`.

    Args:
        names: which token is the tokenizer's `image_token`, `boi_token`, ...
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *characters, *more])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([*SPECIAL, *more])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=names or {"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def llava_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A CLIP tower of four patches before a Llama decoder; the tower has as many layers as the decoder."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_GATED), image_token_id=3, vision_feature_layer=-1
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def llava_processor() -> LlavaProcessor:
    """Makes 28 x 28 pixels and four image tokens of any image."""
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
        tiny_tokenizer(),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def tiny_adapter(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> ModelAdapter:
    """An adapter on a random host of one of the families above, or `llava` or `opt`."""
    if family == "llava":
        return ModelAdapter(llava_model(seed, dtype), processor=llava_processor(), name="tiny-llava")
    if family == "opt":
        return ModelAdapter(opt_model().to(dtype), tokenizer=tiny_tokenizer(), name="tiny-opt", **OPT_TEMPLATES)
    model = from_config(TEXT_CONFIGS[family](), seed, dtype)
    return ModelAdapter(model, tokenizer=tiny_tokenizer(), name=f"tiny-{family}")


def tiny_samples(family: str) -> list[Sample]:
    """Prompts of different lengths with answers; with one image each for `llava`."""
    texts = [("a b", "cde"), ("hello there you", "ok"), ("xyz", "a longer answer")]
    if family != "llava":
        return [Sample(id=f"s{i}", prompt=prompt, answer=answer) for i, (prompt, answer) in enumerate(texts)]
    return [
        Sample(id=f"s{i}", prompt=f"U: <image>\n{prompt} A:", answer=answer, images=(tiny_image(i),))
        for i, (prompt, answer) in enumerate(texts)
    ]


def tiny_image(seed: int) -> Image.Image:
    """Coloured noise, not square."""
    pixels = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


class PlainTranscoder(BaseTranscoder):
    """The formula written down directly: relu features, one random decoder per (source, target)."""

    def __init__(self, config: CLTConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        rng = torch.Generator().manual_seed(seed)
        shape = (config.num_layers, config.num_features, config.d_model)
        self.encoder = torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=dtype) * 0.3)
        self.decoder = torch.nn.Parameter(torch.randn(shape[0], *shape, generator=rng, dtype=dtype) * 0.1)
        self.biases = torch.nn.Parameter(torch.randn(shape[0], shape[2], generator=rng, dtype=dtype) * 0.1)

    def encode_layer(self, layer, inputs):
        return (inputs @ self.encoder[layer].T).relu()

    def encode(self, inputs):
        return torch.stack([self.encode_layer(layer, x) for layer, x in enumerate(inputs)])

    def contributions(self, source, features):
        targets = self.config.targets_of(source)
        empty = features.new_zeros(0, len(features), self.config.d_model)
        parts = [features @ self.decoder[source, target] for target in targets]
        return torch.stack(parts) if parts else empty

    def bias(self, target):
        return self.biases[target]

    def decode(self, features, inputs=None):
        out = self.biases[:, None].repeat(1, features.shape[1], 1)
        for source, a in enumerate(features):
            for target in self.config.targets_of(source):
                out[target] += a @ self.decoder[source, target]
        return out


def plain_transcoder(adapter: ModelAdapter, seed: int = 0, **options: Any) -> PlainTranscoder:
    """A random transcoder that fits the adapter."""
    settings = {"num_features": 12, "activation_fn": "relu", **options}
    config = CLTConfig(num_layers=adapter.n_layers, d_model=adapter.d_model, **settings)
    return PlainTranscoder(config, seed, adapter.dtype)
