"""Layers and width of hosts, without loading one: published figures of common ones, or a config.json."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from clt.errors import ConfigError

HOST_SHAPES: dict[str, tuple[int, int]] = {
    "openai-community/gpt2": (12, 768),
    "openai-community/gpt2-medium": (24, 1024),
    "openai-community/gpt2-large": (36, 1280),
    "openai-community/gpt2-xl": (48, 1600),
    "EleutherAI/pythia-70m": (6, 512),
    "EleutherAI/pythia-160m": (12, 768),
    "EleutherAI/pythia-410m": (24, 1024),
    "EleutherAI/pythia-1b": (16, 2048),
    "EleutherAI/pythia-1.4b": (24, 2048),
    "EleutherAI/pythia-2.8b": (32, 2560),
    "EleutherAI/pythia-6.9b": (32, 4096),
    "EleutherAI/pythia-12b": (36, 5120),
    "google/gemma-2-2b": (26, 2304),
    "google/gemma-2-9b": (42, 3584),
    "google/gemma-2-27b": (46, 4608),
    "google/gemma-3-1b-pt": (26, 1152),
    "google/gemma-3-4b-pt": (34, 2560),
    "google/gemma-3-12b-pt": (48, 3840),
    "google/gemma-3-27b-pt": (62, 5376),
    "meta-llama/Llama-2-7b-hf": (32, 4096),
    "meta-llama/Llama-2-13b-hf": (40, 5120),
    "meta-llama/Llama-2-70b-hf": (80, 8192),
    "meta-llama/Llama-3.2-1B": (16, 2048),
    "meta-llama/Llama-3.2-3B": (28, 3072),
    "meta-llama/Llama-3.1-8B": (32, 4096),
    "meta-llama/Llama-3.1-70B": (80, 8192),
    "mistralai/Mistral-7B-v0.1": (32, 4096),
    "mistralai/Mixtral-8x7B-v0.1": (32, 4096),
    "microsoft/phi-2": (32, 2560),
    "microsoft/Phi-3-mini-4k-instruct": (32, 3072),
    "Qwen/Qwen2.5-0.5B": (24, 896),
    "Qwen/Qwen2.5-1.5B": (28, 1536),
    "Qwen/Qwen2.5-3B": (36, 2048),
    "Qwen/Qwen2.5-7B": (28, 3584),
    "Qwen/Qwen2.5-14B": (48, 5120),
    "Qwen/Qwen2.5-32B": (64, 5120),
    "Qwen/Qwen2.5-72B": (80, 8192),
    "Qwen/Qwen3-0.6B": (28, 1024),
    "Qwen/Qwen3-1.7B": (28, 2048),
    "Qwen/Qwen3-4B": (36, 2560),
    "Qwen/Qwen3-8B": (36, 4096),
    "Qwen/Qwen3-14B": (40, 5120),
    "Qwen/Qwen2-VL-2B-Instruct": (28, 1536),
    "Qwen/Qwen2-VL-7B-Instruct": (28, 3584),
    "Qwen/Qwen2.5-VL-3B-Instruct": (36, 2048),
    "Qwen/Qwen2.5-VL-7B-Instruct": (28, 3584),
    "HuggingFaceTB/SmolLM2-135M": (30, 576),
    "HuggingFaceTB/SmolLM2-360M": (32, 960),
    "HuggingFaceTB/SmolLM2-1.7B": (24, 2048),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (22, 2048),
    "llava-hf/llava-1.5-7b-hf": (32, 4096),
    "llava-hf/llava-1.5-13b-hf": (40, 5120),
    "llava-hf/llava-v1.6-mistral-7b-hf": (32, 4096),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (24, 896),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (28, 3584),
    "Salesforce/instructblip-vicuna-7b": (32, 4096),
    "google/paligemma-3b-pt-224": (18, 2048),
}
"""Decoder layers and width of the residual stream, from the hosts' published configurations."""

# What families call the two, the decoder's own names first.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_DECODERS = ("text_config", "llm_config", "language_config")


def host_shape(name: str) -> tuple[int, int]:
    """Layers and width of a host.

    Args:
        name: an id of the table (the part after the slash is enough), a local folder, or an id whose config.json the
            Hub client has in its cache. Nothing is downloaded.

    Raises:
        ConfigError: none of these, or a config.json that names no layers or width.
    """
    if Path(name).is_dir():
        return _from_config(Path(name) / "config.json")
    by_name = {key.lower(): shape for key, shape in HOST_SHAPES.items()}
    by_name |= {key.rpartition("/")[2]: shape for key, shape in by_name.items()}
    if name.lower() in by_name:
        return by_name[name.lower()]
    cached = _cached_config(name)
    if cached is not None:
        return _from_config(cached)
    close = difflib.get_close_matches(name.lower(), by_name, n=3)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    raise ConfigError(
        f"The dimensions of {name!r} are not in the table of `clt plan`, and it is no local folder.{hint}\n"
        "Give --n-layers and --d-model instead, or a folder that holds its config.json."
    )


def _cached_config(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _from_config(path: Path) -> tuple[int, int]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist, so the host's dimensions are unknown.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}).") from None
    decoder: dict[str, Any] = next((values[name] for name in _DECODERS if isinstance(values.get(name), dict)), values)
    layers = next((decoder[name] for name in _LAYERS if name in decoder), None)
    width = next((decoder[name] for name in _WIDTH if name in decoder), None)
    if not isinstance(layers, int) or not isinstance(width, int):
        raise ConfigError(
            f"{path} says neither how many layers the decoder has ({', '.join(_LAYERS)}) nor how wide it is "
            f"({', '.join(_WIDTH)}); found {layers!r} and {width!r}. Give --n-layers and --d-model."
        )
    return layers, width
