"""Generation with a transcoder in place of the MLPs against the host alone, tokens per second side by side.

    python benchmarks/replacement.py                 # the embedded vision-language model
    python benchmarks/replacement.py --host 12x768   # a random GPT-2-small

Random TopK transcoders (k = 32 per layer): speed does not depend on what was learned. Host and replacement take turns,
so that a busy machine slows both; the JSON line holds the ratio of their medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from clt import worlds
from clt.config import CLTConfig
from clt.lm import HostInputs, ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import Intervention, ReplacementModel, SteeredHost


def embedded_host(rows: int) -> tuple[ModelAdapter, HostInputs]:
    """The shapes world's LLaVA with held-out pictures to describe."""
    world = worlds.load("shapes")
    assert isinstance(world, worlds.HostedWorld)
    adapter = ModelAdapter.from_pretrained(world.host_path())
    return adapter, adapter.prepare(world.samples("held_out", rows), with_answer=False, padding_side="left")


def gpt2_small(rows: int) -> tuple[ModelAdapter, HostInputs]:
    """12 layers, d_model 768, random weights, 32 prompt tokens."""
    torch.manual_seed(0)
    adapter = ModelAdapter(AutoModelForCausalLM.from_config(GPT2Config()).eval().requires_grad_(False))
    return adapter, adapter.prepare_tokens(torch.randint(0, 50000, (rows, 32)))


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=["shapes", "12x768"], default="shapes")
    parser.add_argument("--features", type=int, help="per layer; default 8 times d_model")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    adapter, inputs = (embedded_host if options.host == "shapes" else gpt2_small)(options.rows)
    config = CLTConfig(
        num_features=options.features or 8 * adapter.d_model,
        num_layers=adapter.n_layers,
        d_model=adapter.d_model,
        activation_fn="topk",
        topk_k=32,
    )
    transcoder = CrossLayerTranscoder(config).requires_grad_(False)
    act = Intervention(0, 0, "add", 1.0)
    models = {"replacement": ReplacementModel(adapter, transcoder), "steered_host": SteeredHost(adapter, transcoder)}

    def generate() -> None:
        # Exactly so many tokens, whatever they are: an end token must not cut one side short.
        arguments = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
        adapter.model.generate(**inputs.tensors, **arguments, pad_token_id=0)  # pyright: ignore[reportCallIssue]

    def inside(name: str) -> None:
        with torch.no_grad(), models[name].active(inputs, interventions=act if name == "steered_host" else None):
            generate()

    runs: dict[str, Callable[[], None]] = {"host": generate, **{name: lambda n=name: inside(n) for name in models}}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.repeats + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if round_:
                times[name].append(taken)
    medians = {name: statistics.median(each) for name, each in times.items()}
    n_tokens = options.tokens * options.rows
    result = {
        "benchmark": "replacement",
        **vars(options),
        "features": config.num_features,
        "tokens_per_second": {name: round(n_tokens / each, 1) for name, each in medians.items()},
        "replacement_over_host": round(medians["host"] / medians["replacement"], 3),
        "steered_over_host": round(medians["host"] / medians["steered_host"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
