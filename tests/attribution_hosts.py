"""Hosts, transcoders and prompts for attribution, a tiny Qwen2.5-VL among them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from clt.config import CLTConfig
from clt.lm import HostInputs, ModelAdapter
from clt.lm.inputs import kinds
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from tests.tiny_hosts import _GATED, N_LAYERS, WIDTH, tiny_adapter, tiny_samples, tiny_tokenizer

QWEN_IMAGE, QWEN_VISION = 3, (298, 297)


def qwen_vl_adapter(dtype: torch.dtype = torch.float32) -> ModelAdapter:
    """A tower that makes 2 x 3 tokens of 4 x 6 patches, before a Qwen2 decoder with positions in three dimensions."""
    rope = {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 10000.0}
    vision = {
        "depth": N_LAYERS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 4,
        "out_hidden_size": WIDTH,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "in_channels": 3,
    }
    config = Qwen2_5_VLConfig(
        text_config={**_GATED, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=QWEN_IMAGE,
        video_token_id=299,
        vision_start_token_id=QWEN_VISION[0],
        vision_end_token_id=QWEN_VISION[1],
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype).eval()
    return ModelAdapter(model, tokenizer=tiny_tokenizer(), name="tiny-qwen2_5_vl")


def qwen_vl_inputs(adapter: ModelAdapter) -> HostInputs:
    """One image of 2 x 3 tokens with text on both sides."""
    ids = torch.tensor([[0, QWEN_VISION[0], *[QWEN_IMAGE] * 6, QWEN_VISION[1], 40, 50, 60]])
    mask = torch.ones_like(ids)
    pixels = torch.randn(24, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    return HostInputs(
        tensors={
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == QWEN_IMAGE).int(),
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 6]]),
        },
        kind=kinds(ids, mask, adapter.token_ids),
        position=torch.arange(ids.shape[1])[None],
        answer=torch.zeros_like(ids, dtype=torch.bool),
        sample_ids=("0",),
    )


def host_and_inputs(family: str) -> tuple[ModelAdapter, HostInputs]:
    """An adapter and one prompt of it."""
    if family == "qwen2_5_vl":
        adapter = qwen_vl_adapter()
        return adapter, qwen_vl_inputs(adapter)
    adapter = tiny_adapter(family)
    return adapter, adapter.prepare(tiny_samples(family)[:1])


def random_transcoder(adapter: ModelAdapter, seed: int = 0, **options: Any) -> CrossLayerTranscoder:
    """A transcoder whose every parameter is random, biases, offsets and skips included, and that fires often."""
    settings = {"num_features": 12, "activation_fn": "relu", "normalization_method": "none", **options}
    config = CLTConfig(num_layers=adapter.n_layers, d_model=adapter.d_model, **settings)
    transcoder = CrossLayerTranscoder(config, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transcoder.named_parameters():
            if not name.startswith("log_threshold"):
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
        for side in ("input", "target"):
            getattr(transcoder, f"{side}_scale").copy_(0.5 + torch.rand(adapter.n_layers, WIDTH, generator=rng))
            getattr(transcoder, f"{side}_shift").copy_(0.1 * torch.randn(adapter.n_layers, WIDTH, generator=rng))
    return transcoder


def random_replacement(family: str, seed: int = 0, **options: Any) -> tuple[ReplacementModel, HostInputs]:
    """A host, a random transcoder for it, and one prompt."""
    adapter, inputs = host_and_inputs(family)
    return ReplacementModel(adapter, random_transcoder(adapter, seed, **options)), inputs
