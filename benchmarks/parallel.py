"""How much faster several ranks are: tokens per second of training steps, and what the ranks told each other.

    python benchmarks/parallel.py
    torchrun --nproc-per-node 2 benchmarks/parallel.py --dp 2      as many tokens per rank as one rank alone
    torchrun --nproc-per-node 2 benchmarks/parallel.py --tp 2      half of the features per rank

One thread per rank (OMP_NUM_THREADS=1). Weak scaling is the tokens per second of two ranks over twice those of one.
With --route plain autograd computes the step, as it always does for topk and batchtopk in parts (--tp). Prints one JSON
line.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import tyro

from clt.config import CLTConfig, TrainingConfig
from clt.models import CrossLayerTranscoder
from clt.parallel.feature_shard import Shards, shard_config
from clt.parallel.mesh import Mesh, open_mesh
from clt.training.step import Engine
from clt.types import ActivationBatch


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    activation: Literal["jumprelu", "topk", "batchtopk"] = "jumprelu"
    layers: int = 4
    d_model: int = 128
    features: int = 1024
    """Per layer, of the whole dictionary."""
    tokens: int = 1024
    """Per copy of the dictionary and step."""
    k: int = 32
    steps: int = 12
    """Of which the first two do not count."""
    route: Literal["auto", "plain"] = "auto"
    tp: int | None = None
    dp: int | None = None


def batch_of(options: Options, copy: int) -> ActivationBatch:
    """Random tokens, others for each copy."""
    rng = torch.Generator().manual_seed(copy)
    shape = options.layers, options.tokens, options.d_model
    sides = [torch.randn(shape, generator=rng) for _ in range(2)]
    zeros = torch.zeros(options.tokens, dtype=torch.int64)
    return ActivationBatch(sides[0], sides[1], kind=zeros.to(torch.uint8), sample=zeros, position=zeros)


def measure(options: Options, mesh: Mesh) -> dict[str, object]:
    """Steps on one batch, which is always there."""
    whole = CLTConfig(
        num_features=options.features,
        num_layers=options.layers,
        d_model=options.d_model,
        activation_fn=options.activation,
        topk_k=options.k,
        batchtopk_k=options.k * options.layers,
    )
    here = shard_config(whole, mesh.tp.rank, mesh.tp.size)
    model = CrossLayerTranscoder(here, device=mesh.device, peers=None if mesh.is_alone else Shards(whole, mesh))
    engine = Engine(model, TrainingConfig(route=options.route), mesh)
    batch = batch_of(options, mesh.dp.rank).to(mesh.device)
    dead = torch.zeros(options.layers, here.num_features, dtype=torch.bool, device=mesh.device)
    seconds = []
    for step in range(options.steps):
        mesh.traffic.reset()
        mesh.barrier()
        begin = time.perf_counter()
        engine.step(batch, step, dead)
        mesh.barrier()
        seconds.append(time.perf_counter() - begin)
    best = min(seconds[2:])
    return {
        **asdict(options),
        "ranks": {"tp": mesh.tp.size, "dp": mesh.dp.size},
        "seconds_per_step": round(best, 4),
        "tokens_per_second": round(options.tokens * mesh.dp.size / best, 1),
        "bytes_told_per_step": dict(mesh.traffic.bytes),
        "torch": torch.__version__,
    }


def main(options: Options) -> None:
    """Measure, and let the first rank print."""
    torch.set_num_threads(1)
    with open_mesh(options.tp, options.dp) as mesh:
        result = measure(options, mesh)
        if mesh.is_main:
            print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
