"""A global shuffle of a data set that does not fit in memory: deal rows into buckets, then shuffle each bucket.

Every row goes to a random bucket (pass 1); the buckets, each small enough for memory, are shuffled and written one
after the other (pass 2). The result is a uniformly random order, and a function of the seed alone.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8, UInt64

from clt.data.codecs import Codec
from clt.data.files import refusing_a_full_disk
from clt.data.metadata import HDF5_FORMAT, METADATA_FILE, PROGRESS_FILE, Metadata
from clt.data.sampler import one_run
from clt.data.sources import Rows, ShardSource, open_local
from clt.data.writer import ActivationWriter
from clt.errors import DatasetError
from clt.types import ActivationBatch

BLOCK_TOKENS = 4096
"""Rows dealt out at once."""
_BUCKETS = ".buckets"


@dataclass(frozen=True)
class ScrambleResult:
    """What was written, and the proof that nothing else was."""

    folder: Path
    tokens: int
    fingerprint: int
    """Sum over rows of a hash of each, which no order changes; compared between input and output."""


def scramble(
    input_folder: str | Path, output_folder: str | Path, *, seed: int, memory_bytes: int = 2**29
) -> list[ScrambleResult]:
    """Write every row of a data set once, in a random order; both parts of a divided one.

    Args:
        input_folder: what `clt generate` wrote.
        output_folder: must not hold anything but an unfinished scramble.
        seed: of the order.
        memory_bytes: about how much to hold at once.

    Raises:
        DatasetError: the output is not empty, the input is damaged or int8, or a row went missing.
    """
    source, target = Path(input_folder), Path(output_folder)
    if (source / METADATA_FILE).exists() or not (source / "train").is_dir():
        return [_scramble_one(source, target, seed, memory_bytes)]
    parts = [part for part in ("train", "held_out") if (source / part).is_dir()]
    return [_scramble_one(source / part, target / part, seed, memory_bytes) for part in parts]


def fingerprint(source: ShardSource) -> int:
    """A number that depends on the rows and on how often each occurs, but not on their order."""
    return sum(int(_hashes(rows).sum()) for rows in _blocks(source)) % 2**64


def _scramble_one(folder: Path, target: Path, seed: int, memory_bytes: int) -> ScrambleResult:
    source = open_local(folder)
    metadata = source.metadata
    if metadata.dtype == "int8":
        raise DatasetError(
            f"{folder} is int8, whose scales would have to be measured again and change the rows.\n"
            "Scramble the data set it came from, then convert that."
        )
    _require_empty(target)
    shutil.rmtree(target / _BUCKETS, ignore_errors=True)
    (target / _BUCKETS).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    row_bytes = 2 * metadata.info.num_layers * metadata.info.d_model * source.read(one_run(0, 0, 1)).rows.element_size()
    n_buckets = max(1, -(-metadata.total_tokens * row_bytes // max(memory_bytes // 2, 1)))
    with refusing_a_full_disk(target, 2 * metadata.total_tokens * row_bytes):
        before = _deal(source, target / _BUCKETS, int(n_buckets), rng)
    with _writer(target, metadata, folder, seed) as writer:
        for bucket in range(int(n_buckets)):
            _write_bucket(writer, target / _BUCKETS / str(bucket), rng)
    shutil.rmtree(target / _BUCKETS)
    after = fingerprint(open_local(target))
    if before != after:
        raise DatasetError(
            f"{target} does not hold the rows of {folder} (fingerprints {after:016x} and {before:016x}). "
            "A disk is failing, or the input was changed meanwhile. Delete the output and try again."
        )
    return ScrambleResult(target, metadata.total_tokens, after)


def _require_empty(target: Path) -> None:
    if (
        target.exists()
        and any(target.iterdir())
        and not ((target / PROGRESS_FILE).exists() or (target / _BUCKETS).exists())
    ):
        raise DatasetError(f"{target} is not empty. Choose another output folder, or delete it.")


def _writer(target: Path, metadata: Metadata, folder: Path, seed: int) -> ActivationWriter:
    codec = Codec("hdf5" if metadata.format == HDF5_FORMAT else "safetensors")
    provenance = {**metadata.info.provenance, "scrambled_from": str(folder), "scramble_seed": seed}
    return ActivationWriter(
        target,
        replace(metadata.info, provenance=provenance),
        dtype=metadata.dtype,
        shard_tokens=metadata.shard_tokens,
        seed=seed,
        codec=codec,
    )


def _blocks(source: ShardSource) -> Iterator[Rows]:
    for shard, record in enumerate(source.metadata.shards):
        for start in range(0, record.tokens, BLOCK_TOKENS):
            yield source.read(one_run(shard, start, min(record.tokens, start + BLOCK_TOKENS)))


def _deal(source: ShardSource, folder: Path, n_buckets: int, rng: np.random.Generator) -> int:
    """Pass 1; returns the fingerprint of what was read."""
    total = 0
    for rows in _blocks(source):
        total += int(_hashes(rows).sum())
        records = _to_records(rows)
        choice = rng.integers(0, n_buckets, size=len(records))
        for bucket in np.unique(choice).tolist():
            with (folder / str(bucket)).open("ab") as file:
                file.write(records[choice == bucket].tobytes())
    return total % 2**64


def _write_bucket(writer: ActivationWriter, path: Path, rng: np.random.Generator) -> None:
    if not path.exists():
        return
    rows = _from_records(np.fromfile(path, np.uint8), writer)
    order = torch.from_numpy(rng.permutation(len(rows.sample)))
    for start in range(0, len(order), BLOCK_TOKENS):
        chosen = order[start : start + BLOCK_TOKENS]
        batch = ActivationBatch(
            inputs=rows.rows[chosen, 0].transpose(0, 1),
            targets=rows.rows[chosen, 1].transpose(0, 1),
            kind=rows.kind[chosen],
            sample=rows.sample[chosen],
            position=rows.position[chosen],
        )
        writer.append(batch)


def _to_records(rows: Rows) -> UInt8[np.ndarray, "token byte"]:
    """Each token's activations, sample, position and kind as one run of bytes."""
    columns = [
        rows.rows.reshape(len(rows.sample), -1),
        rows.sample[:, None],
        rows.position[:, None],
        rows.kind[:, None],
    ]
    return np.concatenate([column.contiguous().view(torch.uint8).numpy() for column in columns], axis=1)


def _from_records(data: UInt8[np.ndarray, " byte"], writer: ActivationWriter) -> Rows:
    layout = writer.layout
    records = data.reshape(-1, layout.row_bytes + 8 + 4 + 1)
    ends = np.cumsum([layout.row_bytes, 8, 4])
    # Copies, because a part of a record need not lie where its type wants to be.
    activations, sample, position, kind = (torch.from_numpy(part.copy()) for part in np.split(records, ends, axis=1))
    shape = (len(records), 2, layout.num_layers, layout.d_model)
    return Rows(
        activations.view(layout.torch_dtype).view(shape),
        sample.view(torch.int64)[:, 0],
        position.view(torch.int32)[:, 0],
        kind[:, 0],
    )


def _hashes(rows: Rows) -> UInt64[np.ndarray, " token"]:
    """A 64-bit hash of each row: a random linear map of its 64-bit words, then mixed (the finaliser of MurmurHash3)."""
    records = _to_records(rows)
    words = np.pad(records, ((0, 0), (0, -records.shape[1] % 8))).view(np.uint64)
    factors = np.random.default_rng(0).integers(1, 2**63, size=words.shape[1], dtype=np.uint64) | np.uint64(1)
    mixed = words @ factors
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    return mixed ^ (mixed >> np.uint64(33))
