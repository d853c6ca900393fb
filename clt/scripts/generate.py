"""Capture what a host's MLPs read and write, to disk.

clt generate --model gpt2 --dataset monology/pile-uncopyrighted --target-total-tokens 2000000
clt generate --model world:shapes --dataset world:shapes
torchrun --nproc-per-node 8 -m clt generate ...     the same data set by 8 processes (docs/many-machines.md)
"""

import sys
from pathlib import Path
from typing import Any

from clt.activation_generation import ActivationGenerator
from clt.config import ActivationConfig
from clt.data.metadata import metadata_from_json, read_json
from clt.parallel.mesh import PATIENCE_SECONDS, open_mesh

Options = ActivationConfig

# Flags of crosslayer-coding that do nothing here: what to say when one is given another value than the seed's default.
_DEAD = {
    "dataset_trust_remote_code": (True, "--trust-remote-code", "code of data sets is never run"),
    "compute_norm_stats": (False, "--no-compute-norm-stats", "statistics are always written; they cost nothing here"),
    "storage_type": ("remote", "--storage-type", "--remote-server-url alone decides about uploading"),
    "enable_profiling": (True, "--enable-profiling", "benchmarks/activations.py measures"),
}


def plan(options: ActivationConfig) -> dict[str, Any]:
    """What would be read and written."""
    generator = ActivationGenerator(options)
    tokens = "every token" if options.target_total_tokens is None else f"{options.target_total_tokens:,} tokens"
    there = "finished already, nothing to do" if generator.is_finished else "to be written, or gone on with"
    return {
        "read": [f"{tokens} of {options.dataset_path}", f"the host {options.model_name}"],
        "write": [f"{split}: {path} ({there})" for split, path in generator.splits.items()],
    }


def main(options: ActivationConfig) -> dict[str, Any] | None:
    """Write the data set, or say that it is there already; gives tokens and folder of each split (on rank 0)."""
    # Ranks exchange a few words only, so they talk over the network even where hosts are on GPUs.
    with open_mesh(device="cpu", timeout_seconds=PATIENCE_SECONDS) as mesh:
        generator = ActivationGenerator(options, mesh=mesh)
        if mesh.is_main:
            _notes(options)
        was_finished = generator.is_finished
        folder = generator.run()
        return _report(generator, folder, was_finished) if mesh.is_main else None


def _notes(options: ActivationConfig) -> None:
    """Say which of the given flags do nothing."""
    for name, (value, flag, why) in _DEAD.items():
        if getattr(options, name) == value:
            sys.stderr.write(f"note: {flag} has no effect: {why}.\n")
    for side in ("tracer-kwargs", "invoker-args"):
        if options.backend == "hooks" and getattr(options, f"nnsight_{side.replace('-', '_')}"):
            sys.stderr.write(f"note: --nnsight-{side}-json has no effect: give --backend nnsight to use nnsight.\n")


def _report(generator: ActivationGenerator, folder: Path, was_finished: bool) -> dict[str, Any]:
    if was_finished:
        print(f"{folder} is already finished with these options; nothing to do.")
    result: dict[str, Any] = {}
    for split, path in generator.splits.items():
        metadata = metadata_from_json(read_json(path))
        print(
            f"{split}: {metadata.total_tokens:,} tokens x {metadata.info.num_layers} layers x {metadata.info.d_model} "
            f"as {metadata.dtype} in {len(metadata.shards)} shards: {path}"
        )
        result[split] = {"folder": str(path), "tokens": metadata.total_tokens, "shards": len(metadata.shards)}
    return result
