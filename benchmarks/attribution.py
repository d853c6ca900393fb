"""Attribution on a GPT-2-small-sized host with random weights: time per row and memory, against gather-and-contract.

python benchmarks/attribution.py                 # 9 tokens, 4,449 active features
python benchmarks/attribution.py --tokens 2500   # a whole graph of a long prompt: seconds and peak memory
python benchmarks/attribution.py --llava --nodes 7500   # positions, layers and features of LLaVA-1.5's graph, 64 wide
python benchmarks/attribution.py --device cuda [--tokens 2500]

The reference gathers the gradient once per (feature, written layer) pair and contracts each with its vector, as
circuit-tracer 0.4.1 does; ours makes one product per (layer, position). Both walk back the same linearised host, with
the same targets: 64 features of the top layer. Seconds are of processor time over all threads, so that other work on
the machine does not count; on a GPU they are of a clock. Prints one JSON line; what counts is the ratio within the run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from clt.attribution import AttributionOptions
from clt.attribution.assemble import assemble
from clt.attribution.attribute import Setting, _reads, _setting, compute_rows
from clt.attribution.backward import Backward
from clt.attribution.plan import plan_of
from clt.attribution.prompt import describe_positions
from clt.attribution.rows import RowStore
from clt.attribution.sources import Sources
from clt.config import CLTConfig
from clt.lm import HostInputs, ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from clt.types import Sample
from clt.worlds import load

LAYERS, WIDTH, FEATURES = 12, 768, 3072
LLAVA_LAYERS, LLAVA_POSITIONS = 32, 620
ACTIVE, TOKENS, ROWS = 4449, 9, 64


class GatheringSources(Sources):
    """The reference: a copy of the gradient per pair, then one contraction over all pairs of a layer."""

    def contract(
        self, target: int, gradient: Float[Tensor, "row position d_model"], rows: Float[Tensor, "column row"]
    ) -> None:
        """As in `Sources`, the obvious way."""
        gathered = gradient.float()[:, self.active.position[self.pairs[target].numbers]]
        rows.index_add_(0, self.pairs[target].numbers, torch.einsum("rpd,pd->pr", gathered, self._vectors(target)))
        first = self.first_error + target * self.n_positions
        rows[first : first + self.n_positions] = torch.einsum("rpd,pd->pr", gradient.float(), self.errors[target])

    @cache  # noqa: B019 - one object, as long as the benchmark
    def _vectors(self, target: int) -> Float[Tensor, "pair d_model"]:
        return self._kept[target] * self.pairs[target].amounts[:, None]


def now() -> float:
    """Processor time; on a GPU a clock's, when it is done."""
    if not torch.cuda.is_initialized():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def build(n_tokens: int, device: str) -> tuple[ReplacementModel, HostInputs]:
    """Host and transcoder with random weights; thresholds such that 4,449 features fire on nine tokens."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=12, n_positions=max(1024, n_tokens))
    host: Any = GPT2LMHeadModel(config).eval().requires_grad_(False)
    adapter = ModelAdapter(host.to(device), name="random-gpt2-small")
    inputs = adapter.prepare_tokens(torch.randint(0, config.vocab_size, (1, n_tokens)))
    transcoder = CrossLayerTranscoder(
        CLTConfig(
            num_features=FEATURES,
            num_layers=LAYERS,
            d_model=WIDTH,
            activation_fn="jumprelu",
            normalization_method="none",
        ),
        device=device,
    )
    reads = adapter.capture(inputs).inputs[:, 1:]
    with torch.no_grad():
        for layer, x in enumerate(reads):
            wanted = (ACTIVE // LAYERS + (layer < ACTIVE % LAYERS)) * len(x) // (TOKENS - 1)
            h = transcoder.preactivation(layer, x)
            top = h.flatten().topk(wanted + 1).values[-2:].mean()
            transcoder.log_threshold[layer].fill_(float(top.log()))
    return ReplacementModel(adapter, transcoder.requires_grad_(False)), inputs


def build_llava() -> tuple[ReplacementModel, HostInputs]:
    """LLaVA-1.5's 620 positions and 32 layers, 64 wide, TopK with 4 of 2,048 features on per token and layer."""
    from capture_size import make_host

    adapter = make_host(LLAVA_LAYERS)
    config = CLTConfig(num_features=2048, num_layers=LLAVA_LAYERS, d_model=64, activation_fn="topk", topk_k=4)
    scene = load("shapes").descriptions("held_out", 1)[0]
    prompt = "<image>" + "." * (LLAVA_POSITIONS - 576 - 1)
    inputs = adapter.prepare([Sample(id="0", prompt=prompt, images=scene.images)])
    assert inputs.input_ids.shape[1] == LLAVA_POSITIONS
    return ReplacementModel(adapter, CrossLayerTranscoder(config).requires_grad_(False)), inputs


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of several runs."""
    times = []
    for _ in range(repeats):
        start = now()
        work()
        times.append(now() - start)
    return statistics.median(times)


def short(setting: Setting) -> dict[str, Any]:
    """Ours against the reference on one batch of rows."""
    active = setting.active
    ids = (active.layer == LAYERS - 1).nonzero().squeeze(1)[:ROWS].tolist()
    reads, _ = _reads(setting, ids)
    sources = setting.sources
    reference = GatheringSources(setting.linear, setting.transcoder, active, 1)
    ours = Backward(setting.linear, setting.transcoder, sources, ROWS)
    theirs = Backward(setting.linear, setting.transcoder, reference, ROWS)
    difference = float((ours.rows(reads) - theirs.rows(reads)).abs().max())
    fast, slow = seconds(lambda: ours.rows(reads), 5), seconds(lambda: theirs.rows(reads), 3)
    return {
        "seconds_per_row": fast / ROWS,
        "reference_seconds_per_row": slow / ROWS,
        "times_faster": slow / fast,
        "largest_difference": difference,
    }


def long(model: ReplacementModel, setting: Setting, inputs: HostInputs, nodes: int, folder: Path) -> dict[str, Any]:
    """A whole graph of a long prompt, rows on disk, pruned and saved: seconds of each part, and what was planned."""
    options = AttributionOptions(max_feature_nodes=nodes)
    plan = plan_of(model, setting, options)
    start = now()
    store = RowStore(folder / "rows", {}, setting.sources.n_columns)
    compute_rows(store, setting, options, plan.batch_size, progress=True)
    rows = now() - start
    start = now()
    positions = describe_positions(model.adapter, inputs, inputs)
    graph = assemble(store, setting.sources, setting.targets.nodes, positions, "random tokens", options, {}, [])
    pruned = graph.prune()
    graph.save(folder / "graph")
    layers = torch.bincount(graph.features[:, 0], minlength=model.adapter.n_layers).tolist()
    return {
        "rows": graph.edges.n_rows,
        "features_by_layer": layers,
        "rows_seconds": rows,
        "seconds_per_row": rows / graph.edges.n_rows,
        "finish_seconds": now() - start,
        "row_sum_error": graph.info["checks"]["row_sum_error"],
        "kept_nodes": int(pruned.node_mask.sum()),
        "disk_gb": sum(file.stat().st_size for file in (folder / "rows").iterdir()) / 1e9,
        "graph_gb": sum(file.stat().st_size for file in (folder / "graph").iterdir()) / 1e9,
        "planned_gb": {
            name: size / 1e9 for name, size in plan.to_dict().items() if name != "batch_size" and name[:2] != "n_"
        },
        "batch_size": plan.batch_size,
        "pairs": plan.n_pairs,
    }


def main() -> None:
    """Run one of the two and print a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--nodes", type=int, default=128, help="features with a row of their own, of a long prompt")
    parser.add_argument("--llava", action="store_true", help="a graph of LLaVA-1.5's positions and layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of GPT-2's host and transcoder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, inputs = build_llava() if options.llava else build(options.tokens, options.device)
    begun, start = time.perf_counter(), now()
    with torch.no_grad():
        setting = _setting(model, inputs, None, AttributionOptions())
    prepared = now() - start
    if options.tokens <= 100 and not options.llava:
        result = short(setting)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = long(model, setting, inputs, options.nodes, Path(folder))
    print(
        json.dumps(
            {
                "benchmark": "attribution",
                "host": "random LLaVA" if options.llava else "random GPT-2",
                "tokens": inputs.input_ids.shape[1],
                "active_features": len(setting.active),
                "prepare_seconds": prepared,
                **result,
                "wall_seconds": time.perf_counter() - begun,
                "gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_initialized() else 0.0,
                "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                "threads": options.threads,
                "device": options.device,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
