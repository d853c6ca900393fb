"""What captured features cost on disk: `python benchmarks/capture_size.py`, one JSON line.

A random LLaVA with 576 image tokens (CLIP patches of 14 in 336 pixels; 4 decoder layers, d_model 64) describes scenes
of the shapes world with a TopK transcoder of 8,192 features in place of its MLPs, 32 active per token and layer. The
size of the packed files is scaled to 1,004 samples of 620 tokens and 32 layers.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))
from clt.config import CLTConfig
from clt.discovery.capture import capture
from clt.discovery.layout import Layout
from clt.lm import ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from clt.types import Sample
from clt.worlds import load
from tests.tiny_hosts import tiny_tokenizer

LAYERS, WIDTH, FEATURES, ACTIVE, SAMPLES = 4, 64, 8192, 32, 8


def make_host(layers: int = LAYERS) -> ModelAdapter:
    """Random weights, LLaVA-1.5's layout of tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=172, num_hidden_layers=layers, num_attention_heads=4, vocab_size=300,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tiny_tokenizer(),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    return ModelAdapter(LlavaForConditionalGeneration(config).eval(), processor=processor, name="random-llava")


def main() -> None:
    """Capture, weigh the files, scale."""
    adapter = make_host()
    config = CLTConfig(num_features=FEATURES, num_layers=LAYERS, d_model=WIDTH, activation_fn="topk", topk_k=ACTIVE)
    model = ReplacementModel(adapter, CrossLayerTranscoder(config), capture_activations=True)
    scenes = load("shapes").descriptions("held_out", SAMPLES)
    samples = [Sample(id=str(n), prompt="<image>\nDescribe this.", images=each.images) for n, each in enumerate(scenes)]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        layout = Layout(Path(folder), "size")
        rows = capture(model, samples, layout, max_new_tokens=28, batch_size=1, made_with={})
        size = sum(path.stat().st_size for path in layout.activations.iterdir())
    tokens = sum(row.n_positions for row in rows)
    per_token_and_layer = size / tokens / LAYERS
    line = {
        "tokens_per_sample": tokens / SAMPLES,
        "bits_per_entry": 8 * per_token_and_layer / ACTIVE,
        "gigabytes_at_1004_x_620_x_32": per_token_and_layer * 1004 * 620 * 32 / 1e9,
        "gigabytes_if_32_over_all_layers": per_token_and_layer * 1004 * 620 / 1e9,
        "gigabytes_dense_fp32": 1004 * 620 * 32 * FEATURES * 4 / 1e9,
    }
    print(json.dumps({name: round(value, 3) for name, value in line.items()}))


if __name__ == "__main__":
    main()
