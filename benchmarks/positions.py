"""Peak memory of host and replacement model over the length of one text: `python benchmarks/positions.py`.

A random GPT-2 of GPT-2-small's size (12 layers, d_model 768; a vocabulary of 1,000, so that logits do not hide the
rest) and a random TopK transcoder with 6,144 features per layer, 32 active, full windows. Each number is of a process
of its own: resident memory at its highest, less what it was before the pass; `--generate` tokens follow the text.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from clt.config import CLTConfig
from clt.lm import ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel

LAYERS, WIDTH, FEATURES, ACTIVE = 12, 768, 6144, 32


def resident(which: str) -> float:
    """MiB, of VmRSS (now) or VmHWM (the highest so far)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def measure(kind: str, positions: int, generate: int) -> dict[str, float]:
    """One pass over one text in this process, and some tokens after it."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=positions + generate, vocab_size=1000)
    adapter = ModelAdapter(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    inputs = adapter.prepare_tokens(torch.randint(0, 1000, (1, positions)))
    shape = CLTConfig(num_features=FEATURES, num_layers=LAYERS, d_model=WIDTH, activation_fn="topk", topk_k=ACTIVE)
    replacement = None
    if kind != "host":
        replacement = ReplacementModel(adapter, CrossLayerTranscoder(shape).requires_grad_(False))
    before, start = resident("VmRSS"), time.perf_counter()
    arguments = {"max_new_tokens": generate, "min_new_tokens": generate, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        if replacement is None:
            adapter.model.generate(**inputs.tensors, **arguments)  # pyright: ignore[reportCallIssue]
        else:
            with replacement.active(inputs):
                adapter.model.generate(**inputs.tensors, **arguments)  # pyright: ignore[reportCallIssue]
    seconds = time.perf_counter() - start
    peak = max(resident("VmHWM"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"before": round(before), "peak": round(peak), "growth": round(peak - before), "seconds": round(seconds, 1)}


def main() -> None:
    """Measure each kind at each length and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--kinds", nargs="+", default=["host", "replacement"], choices=["host", "replacement"])
    parser.add_argument("--generate", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="measure one kind at one length in this process")
    options = parser.parse_args()
    if options.alone:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.kinds[0], options.positions[0], options.generate)))
        return
    found: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in options.kinds}
    for positions in options.positions:
        for kind in options.kinds:
            command = [sys.executable, __file__, "--alone", "--positions", str(positions), "--kinds", kind]
            command += ["--generate", str(options.generate), "--threads", str(options.threads)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            found[kind][str(positions)] = json.loads(answer.stdout.splitlines()[-1])
    print(json.dumps({"benchmark": "positions", "features": FEATURES, "mib": found}))


if __name__ == "__main__":
    main()
