"""Speed of activations at rest and on the way: `python benchmarks/activations.py [--tokens N]`, one JSON line.

Host: a random GPT-2 of 6 layers and d_model 256. Rates are tokens per second of wall time, best of several repetitions
on one thread; what counts are the ratios within one run. `plain` is numpy indexing of a memory-mapped array.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config

sys.path.insert(0, str(Path(__file__).parents[1]))
from clt.activation_generation.scramble import scramble
from clt.data import ActivationWriter, DatasetInfo, LocalActivationStore, RemoteActivationStore
from clt.data.background import Background
from clt.data.client import ServerClient
from clt.data.rows import DATA_START
from clt.lm import ModelAdapter
from clt.types import ActivationBatch
from tests.contracts.serving import serving

LAYERS, WIDTH, ROWS, CONTEXT, BATCH = 6, 256, 16, 128, 2048


def rate(work: Callable[[], int], repetitions: int = 5) -> float:
    """Tokens per second of the best of some repetitions; `work` returns how many tokens it moved."""
    best = 0.0
    for _ in range(repetitions):
        begin = time.perf_counter()
        n_tokens = work()
        best = max(best, n_tokens / (time.perf_counter() - begin))
    return best


def make_host(dtype: torch.dtype) -> ModelAdapter:
    """The same random host every time."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=8, vocab_size=5000, n_positions=CONTEXT)
    return ModelAdapter(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), name="random-gpt2")


def measure_generation(folder: Path, n_tokens: int, dtype: str) -> dict[str, float]:
    """To disk, against the bare forward pass of the host (without its language head), in alternation."""
    adapter = make_host(getattr(torch, dtype))
    batches = [
        adapter.prepare_tokens(torch.randint(0, 5000, (ROWS, CONTEXT))) for _ in range(n_tokens // (ROWS * CONTEXT))
    ]
    info = DatasetInfo(model_name="random-gpt2", dataset="random", split="train", num_layers=LAYERS, d_model=WIDTH)

    def bare() -> int:
        with torch.no_grad():
            for inputs in batches:
                adapter.model.base_model(**inputs.tensors, use_cache=False)
        return n_tokens

    def to_disk() -> int:
        target = Path(tempfile.mkdtemp(dir=folder))
        with ActivationWriter(target, info, dtype=dtype, shard_tokens=65_536) as writer, Background() as background:
            for inputs in batches:
                background.do(writer.append, adapter.capture(inputs))
        to_disk.folder = target
        return n_tokens

    rates = {"bare": 0.0, "to_disk": 0.0}
    for _ in range(4):
        rates["bare"] = max(rates["bare"], rate(bare, 1))
        rates["to_disk"] = max(rates["to_disk"], rate(to_disk, 1))
    return {
        "bare_forward_tokens_per_second": rates["bare"],
        "to_disk_tokens_per_second": rates["to_disk"],
        "fraction_of_bare": rates["to_disk"] / rates["bare"],
    }


def write_random(folder: Path, n_tokens: int, dtype: str) -> Path:
    """Normal activations, so that the host's speed does not matter."""
    info = DatasetInfo(model_name="random", dataset="random", split="train", num_layers=LAYERS, d_model=WIDTH)
    rng = torch.Generator().manual_seed(0)
    with ActivationWriter(folder, info, dtype=dtype, shard_tokens=65_536) as writer:
        for start in range(0, n_tokens, 8192):
            values = torch.randn(2, LAYERS, 8192, WIDTH, generator=rng)
            writer.append(
                ActivationBatch(
                    inputs=values[0],
                    targets=values[1],
                    kind=torch.zeros(8192, dtype=torch.uint8),
                    sample=torch.arange(start, start + 8192),
                    position=torch.zeros(8192, dtype=torch.int32),
                )
            )
    return folder


def measure_reads(folder: Path, n_tokens: int) -> dict[str, float]:
    """The store against plain indexing of the same memory-mapped shards."""
    files = sorted(folder.glob("shard_*"))
    shape = (-1, 2, LAYERS, WIDTH)
    maps = [np.memmap(f, np.uint16, "r", DATA_START, (65_536, *shape[1:])) for f in files if f.stat().st_size > 4e8]
    plain = maps[0]
    rng = np.random.default_rng(0)
    out = np.empty((BATCH, *shape[1:]), np.uint16)

    def plain_random() -> int:
        for _ in range(16):
            np.take(plain, rng.integers(0, len(plain), BATCH), axis=0, out=out, mode="clip")
        return 16 * BATCH

    def plain_sequential() -> int:
        for start in range(0, 16 * BATCH, BATCH):
            out[:] = plain[start : start + BATCH]
        return 16 * BATCH

    def store_rate(**options: object) -> float:
        store = LocalActivationStore(folder, batch_size_tokens=BATCH, **options)  # pyright: ignore[reportArgumentType]
        return rate(lambda: sum(next(store).n_tokens for _ in range(16)))

    rates = {"plain_random": rate(plain_random), "plain_sequential": rate(plain_sequential)}
    rates["store_mixed_runs_of_16"] = store_rate()
    rates["store_mixed_single_rows"] = store_rate(run_tokens=1)
    rates["store_sequential"] = store_rate(sampling_strategy="sequential")
    rates["random_fraction"] = rates["store_mixed_runs_of_16"] / rates["plain_random"]
    rates["random_single_row_fraction"] = rates["store_mixed_single_rows"] / rates["plain_random"]
    rates["sequential_fraction"] = rates["store_sequential"] / rates["plain_sequential"]
    return rates


def measure_seed_layout(folder: Path) -> dict[str, float]:
    """HDF5, one fp32 array per layer and side, gzip in chunks of 16,384 rows or none; random rows by h5py indexing."""
    rates = {}
    n_rows = 32_768
    for name, options in (("gzip", {"compression": "gzip", "chunks": (16_384, WIDTH)}), ("none", {})):
        path = folder / f"seed_{name}.hdf5"
        with h5py.File(path, "w") as file:
            for layer in range(LAYERS):
                for side in ("inputs", "targets"):
                    data = np.random.default_rng(layer).standard_normal((n_rows, WIDTH), dtype=np.float32)
                    file.create_dataset(f"layer_{layer}/{side}", data=data, **options)
        rates[f"hdf5_fp32_{name}"] = rate(lambda path=path: _read_seed(path, n_rows), 2)
        path.unlink()
    return rates


def _read_seed(path: Path, n_rows: int) -> int:
    rows = np.sort(np.random.default_rng(0).choice(n_rows, BATCH, replace=False))
    with h5py.File(path, "r") as file:
        for layer in range(LAYERS):
            for side in ("inputs", "targets"):
                file[f"layer_{layer}/{side}"][rows]  # pyright: ignore[reportIndexIssue]
    return BATCH


def measure_server(root: Path, local: float) -> dict[str, float]:
    """Batches over loopback, with one client and with eight at once."""

    def client_rate(address: str, n_clients: int) -> float:
        stores = [
            RemoteActivationStore(
                client=ServerClient(address, "bf16"), batch_size_tokens=BATCH, seed=seed, prefetch_batches=0
            )
            for seed in range(n_clients)
        ]

        def work() -> int:
            threads = [threading.Thread(target=lambda s=s: [next(s) for _ in range(8)]) for s in stores]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return n_clients * 8 * BATCH

        return rate(work, 3)

    with serving(root) as address:
        one, eight = client_rate(address, 1), client_rate(address, 8)
    return {"one_client": one, "eight_clients": eight, "one_of_local": one / local, "eight_of_local": eight / local}


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=131_072)
    n_tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, object] = {"torch": torch.__version__, "cpus": os.cpu_count(), "tokens": n_tokens}
        results["generation"] = {
            dtype: measure_generation(folder, n_tokens // 4, dtype) for dtype in ("bfloat16", "float32")
        }
        bf16, int8 = (write_random(folder / kind, n_tokens, kind) for kind in ("bfloat16", "int8"))
        bf16 = bf16.rename(folder / "bf16")
        size = {path.name: sum(f.stat().st_size for f in path.glob("shard_*")) / n_tokens for path in (bf16, int8)}
        results["bytes_per_token"] = size
        results["int8"] = json.loads((int8 / "metadata.json").read_text())["codec"]["relative_squared_error"]
        reads = measure_reads(bf16, n_tokens)
        results["reads_tokens_per_second"] = reads
        seed = measure_seed_layout(folder)
        results["seed_layout_tokens_per_second"] = seed
        results["times_seed_gzip"] = reads["store_mixed_runs_of_16"] / seed["hdf5_fp32_gzip"]
        results["times_seed_none"] = reads["store_mixed_runs_of_16"] / seed["hdf5_fp32_none"]
        results["server"] = measure_server(folder, reads["store_mixed_runs_of_16"])
        begin = time.perf_counter()
        scramble(bf16, folder / "scrambled", seed=0, memory_bytes=2**28)
        results["scramble_rows_per_second"] = n_tokens / (time.perf_counter() - begin)
        print(json.dumps(results))


if __name__ == "__main__":
    main()
