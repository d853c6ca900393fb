"""How fast a training step is: as a share of what matrix products reach here, and as a multiple of plain PyTorch.

    python benchmarks/train_step.py --workload M --activation jumprelu --dtype fp32 --route auto
    python benchmarks/train_step.py --device cuda --workload G --activation topk --dtype bf16 --steps 10

Ours, the plain trainer and the products take turns in one run, so that whatever else the machine does hits all alike;
peak memory is that of a second process that trains ours only (on a GPU: what its tensors took). Prints one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from clt.config import CLTConfig, TrainingConfig
from clt.models import ActivationStatistics, CrossLayerTranscoder
from clt.models.kernels.build import library
from clt.models.kernels.matmul import onednn_is_faster
from clt.models.kernels.pointers import on_gpu
from clt.training.memory import step_memory
from clt.training.step import Engine
from clt.types import ActivationBatch

_GIB = 2**30


@dataclass(frozen=True)
class Size:
    """Shape of a workload; all windows go from the own layer to the last."""

    layers: int
    d_model: int
    features: int
    tokens: int
    k: int


SIZES = {
    "S": Size(4, 128, 1024, 1024, 32),
    "M": Size(12, 768, 3072, 1024, 32),
    "V": Size(8, 512, 4096, 2048, 48),
    "G": Size(12, 768, 24576, 4096, 32),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    workload: Literal["S", "M", "V", "G"] = "S"
    """G is for GPUs: GPT-2-small with 32 features per dimension, 1.7e9 weights."""
    activation: Literal["relu", "jumprelu", "topk", "batchtopk"] = "jumprelu"
    dtype: Literal["fp64", "fp32", "bf16"] = "fp32"
    """fp64 is no option of training: it shows that two ways compute the same."""
    route: Literal["auto", "dense", "sparse", "plain"] = "auto"
    layers: int | None = None
    """Other than the workload's, for curves; the same for the next three."""
    features: int | None = None
    tokens: int | None = None
    k: int | None = None
    repeats: int = 3
    """Times that ours, plain and products take turns; the best of each counts."""
    steps: int | None = None
    """Steps per turn; None: 10 at S, else 1."""
    warm_up: int = 2
    """Steps before the first measurement."""
    compares: bool = True
    """Measure plain PyTorch too."""
    in_backward: bool = False
    """Optimiser inside the backward pass (without clipping)."""
    recompute: bool = False
    """Compute pre-activations again in the backward pass."""
    threads: int | None = None
    """CPU threads; None: torch's default."""
    device: str = "cpu"
    """Of weights and batches."""
    memory_only: bool = False
    """Train ours alone and print peak memory: what the second process does."""


class Workbench:
    """A transcoder, its two trainers and made-up data with known sparse features."""

    def __init__(self, options: Options) -> None:
        self.options = options
        given = {name: getattr(options, name) for name in ("layers", "features", "tokens", "k")}
        self.size = replace(SIZES[options.workload], **{name: v for name, v in given.items() if v is not None})
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.training = TrainingConfig(
            training_steps=1000,
            train_batch_size_tokens=self.size.tokens,
            precision="bf16" if options.dtype == "bf16" else "fp32",
            route=options.route,
            learning_rate=1e-3,
            gradient_clip_val=None if options.in_backward else 1.0,
            optimizer_in_backward=options.in_backward,
            recompute_encoder=options.recompute,
            preactivation_coef=3e-6,
        )
        directions = torch.Generator().manual_seed(1)
        self._n_known = 4 * self.size.d_model
        shape = self._n_known, self.size.layers * self.size.d_model
        self._directions = [torch.randn(shape, generator=directions).to(options.device) for _ in "xy"]
        self.model = CrossLayerTranscoder(self._config(), device=options.device)
        first = self.batch(10_000)
        mean_std = [x for side in (first.inputs, first.targets) for x in (side.float().mean(1), side.float().std(1))]
        self.model.fit_standardisation(ActivationStatistics(*mean_std))
        self.model.fit_encoder_bias(first.inputs[:, :512], 0.05)
        self.model.to(torch.float64 if options.dtype == "fp64" else torch.float32)
        self.engine = Engine(self.model, self.training)
        self.dead = torch.zeros(self.size.layers, self.size.features, dtype=torch.bool, device=options.device)
        self._plain: Any = None

    @property
    def plain(self) -> Any:
        """The plain trainer, started from the same weights when first asked for."""
        if self._plain is None:
            from plain_trainer import PlainTrainer  # pyright: ignore[reportMissingImports]  # beside this file

            self._plain = PlainTrainer(self.model, self.training)
        return self._plain

    def _config(self) -> CLTConfig:
        size, fn = self.size, self.options.activation
        k: dict[str, Any] = {"topk": {"topk_k": size.k}, "batchtopk": {"batchtopk_k": size.k * size.layers}}.get(fn, {})
        shape: dict[str, Any] = {"num_features": size.features, "num_layers": size.layers, "d_model": size.d_model}
        return CLTConfig(**shape, activation_fn=fn, normalization_method="none", **k)

    def batch(self, seed: int) -> ActivationBatch:
        """Made-up activations: every layer mixes the same few of its known directions; inputs have unit variance."""
        size, rng = self.size, torch.Generator().manual_seed(seed)
        rate = 0.02
        on = (torch.rand(size.tokens, self._n_known, generator=rng) < rate).float()
        on = (on * torch.rand(size.tokens, self._n_known, generator=rng)).to(self.options.device)
        sides = [
            (on @ each / (self._n_known * rate / 3) ** 0.5).view(size.tokens, size.layers, -1).transpose(0, 1)
            for each in self._directions
        ]
        rows = torch.arange(size.tokens, device=on.device)
        x, y = (side.to(torch.bfloat16).contiguous() for side in sides)
        return ActivationBatch(x, y, torch.zeros_like(rows, dtype=torch.uint8), rows, rows)

    def forget_data(self) -> None:
        """Free what batches are made from, which is no part of a training step."""
        self._directions.clear()

    def dense_flops(self) -> float:
        """Of a dense step: encoder forward and weight gradient, decoder forward and both gradients."""
        size = self.size
        encoder = size.layers * size.features * size.d_model
        decoder = sum(size.layers - s for s in range(size.layers)) * size.features * size.d_model
        return 2 * size.tokens * (2 * encoder + 3 * decoder)

    def matmul_rates(self) -> tuple[float, float]:
        """Operations per second and per CPU second of the largest kind of product, by the faster library."""
        size = self.size
        dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[self.options.dtype]
        width = min(size.layers * size.d_model, 4096)
        sides = torch.randn(size.tokens, size.features), torch.randn(size.features, width)
        a, b = (side.to(self.options.device, dtype) for side in sides)
        ways: list[Callable[[], Any]] = [lambda: torch.mm(a, b)]
        if a.is_cuda:
            repeats = 20
        else:
            repeats = 1
            if dtype == torch.float32 and torch.backends.mkldnn.is_available():
                ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))
                packed = b.T.contiguous()
                ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
        seconds = [timed(lambda way=way: [way() for _ in range(repeats)]) for way in ways for _ in range(2)]
        operations = 2 * a.shape[0] * a.shape[1] * b.shape[1] * repeats
        return operations / min(wall for wall, _ in seconds), operations / min(cpu for _, cpu in seconds)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of all threads, until a GPU, too, is done."""
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    _wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed_steps(step: Callable[[int], Any], numbers: range) -> tuple[float, float, float]:
    """Wall and CPU seconds of some steps, and the last one's loss."""
    losses: list[float] = []
    wall, cpu = timed(lambda: losses.extend(float(step(number)) for number in numbers))
    return wall, cpu, losses[-1]


def measure(options: Options) -> dict[str, Any]:
    """All figures of one workload."""
    bench = Workbench(options)
    steps = options.steps or (10 if options.workload == "S" else 1)
    # On a GPU two batches by turns: many would count as memory of a step.
    count = 2 if options.device == "cuda" else options.warm_up + options.repeats * steps
    batches = [bench.batch(seed) for seed in range(count)]
    trainers = {"ours": lambda at: bench.engine.step(batches[at % count], at, bench.dead).losses.total}
    if options.compares:
        plain = bench.plain
        trainers["plain"] = lambda at: plain.step(batches[at % count], at)
    losses = dict.fromkeys(trainers, 0.0)
    best = dict.fromkeys(trainers, (float("inf"), float("inf")))
    peak, peak_cpu, at = 0.0, 0.0, 0
    for turn in range(-1, options.repeats):
        n_steps = options.warm_up if turn < 0 else steps
        for name, step in trainers.items():
            wall, cpu, losses[name] = timed_steps(step, range(at, at + n_steps))
            if turn >= 0:
                best[name] = min(best[name][0], wall / n_steps), min(best[name][1], cpu / n_steps)
        rates = bench.matmul_rates()
        peak, peak_cpu = max(peak, rates[0]), max(peak_cpu, rates[1])
        at += n_steps
    wall, cpu = best["ours"]
    result = {
        "benchmark": "train_step",
        **{name: getattr(options, name) for name in ("workload", "activation", "dtype", "route")},
        **asdict(bench.size),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "torch": torch.__version__,
        "kernels": "triton" if on_gpu(bench.model.b_dec) else "torch" if library() is None else "compiled",
        "fp32_products": "onednn" if onednn_is_faster() else "torch",
        "tokens_per_second": bench.size.tokens / wall,
        "tokens_per_cpu_second": bench.size.tokens / cpu,
        "matmul_peak_gflops": peak / 1e9,
        "dense_equivalent_of_peak": bench.dense_flops() / wall / peak,
        "dense_equivalent_of_peak_cpu": bench.dense_flops() / cpu / peak_cpu,
        "steps": at,
        "loss": losses["ours"],
        "route_at_the_end": "plain" if bench.engine.routes is None else bench.engine.routes.route,
    }
    if options.compares:
        result["ratio_to_plain"] = best["plain"][0] / wall
        result["ratio_to_plain_cpu"] = best["plain"][1] / cpu
        result["plain_tokens_per_cpu_second"] = bench.size.tokens / best["plain"][1]
        result["loss_plain"] = losses["plain"]
    return result | memory_of(options, bench)


def memory_of(options: Options, bench: Workbench) -> dict[str, Any]:
    """Peak of a process of its own, and what the formula in docs/performance.md says."""
    flags = [part for name, value in asdict(options).items() for part in _flag(name, value)]
    route = "dense" if bench.engine.routes is None else bench.engine.routes.route
    sizes = bench.model.config, bench.training, bench.size.tokens, route
    predicted = step_memory(*sizes, is_gpu=options.device == "cuda").total / _GIB
    if options.device == "cuda" and not options.compares:
        return {"peak_memory_gib": _largest_resident(), "predicted_memory_gib": predicted}
    command = [sys.executable, __file__, *flags, "--memory-only"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found | {"predicted_memory_gib": predicted + found["memory_before_gib"]}


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None or name == "memory_only":
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    return [flag, str(value)]


def peak_memory(options: Options) -> dict[str, float]:
    """Largest resident size after three steps of ours, and what Python and torch took before (with a step done).

    On a GPU both are of what tensors took.
    """
    first = Workbench(replace(options, layers=2, features=64, tokens=64, k=4))
    first.engine.step(first.batch(0), 0, first.dead)
    before = _largest_resident()
    bench = Workbench(options)
    batch = bench.batch(0)
    bench.forget_data()
    for step in range(3):
        bench.engine.step(batch, step, bench.dead)
    return {"peak_memory_gib": _largest_resident(), "memory_before_gib": before}


def _largest_resident() -> float:
    """In GiB. Not getrusage: its figure starts from what the parent of this process had."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / _GIB
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / _GIB


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options)
    result = peak_memory(options) if options.memory_only else measure(options)
    print(json.dumps({name: round(v, 5) if isinstance(v, float) else v for name, v in result.items()}))


if __name__ == "__main__":
    main()
