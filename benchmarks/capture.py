"""What capturing costs a host: tokens per second of its bare pass, with activations captured, and copied to the CPU.

    python benchmarks/capture.py
    python benchmarks/capture.py --device cuda --host gpt2-small --rows 64 --context 512

Random weights; `bare` leaves the language head out, as capture does. The three take turns and the best of each counts.
Prints one JSON line; `captured_of_bare` is the ratio within the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, GPT2Config

from clt.lm import ModelAdapter

HOSTS = {"small": (6, 256, 8), "gpt2-small": (12, 768, 12)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    host: Literal["small", "gpt2-small"] = "small"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "cpu"
    rows: int = 16
    """Sequences at a time."""
    context: int = 128
    """Tokens of each."""
    batches: int = 4
    """Of a turn."""
    repeats: int = 4


def make_host(options: Options) -> ModelAdapter:
    """The same random host every time."""
    torch.manual_seed(0)
    layers, width, heads = HOSTS[options.host]
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=options.context)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    return ModelAdapter(model.eval().requires_grad_(False).to(options.device), name=options.host)


def seconds(work: Callable[[], object]) -> float:
    """Until the device is done, too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: Options) -> dict[str, float]:
    """Tokens per second of each way."""
    adapter = make_host(options)
    shape = options.batches, options.rows, options.context
    tokens = torch.randint(0, 50_000, shape, generator=torch.Generator().manual_seed(0))
    batches = [adapter.prepare_tokens(rows) for rows in tokens]

    def bare() -> None:
        with torch.no_grad():
            for inputs in batches:
                adapter.model.base_model(**inputs.tensors, use_cache=False)

    ways: dict[str, Callable[[], object]] = {
        "bare": bare,
        "captured": lambda: [adapter.capture(inputs).n_tokens for inputs in batches],
        "copied": lambda: [adapter.capture(inputs).to("cpu").n_tokens for inputs in batches],
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(options.repeats + 1):  # the first turn warms up, and is never the best
        for name, work in ways.items():
            best[name] = min(best[name], seconds(work))
    rates = {f"{name}_tokens_per_second": tokens.numel() / time for name, time in best.items()}
    ratios = {f"{name}_of_bare": best["bare"] / best[name] for name in ("captured", "copied")}
    return rates | ratios


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options, description=__doc__)
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    result = {"benchmark": "capture", **asdict(options), "device": device, "torch": torch.__version__}
    print(json.dumps(result | {name: round(value, 4) for name, value in measure(options).items()}))


if __name__ == "__main__":
    main()
