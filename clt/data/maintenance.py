"""Looking after a finished data set: what it holds, whether it is whole, leaving out a chunk, another codec."""

import dataclasses
from pathlib import Path

from clt.data.codecs import Codec
from clt.data.files import write_file
from clt.data.hdf5 import tokens_file
from clt.data.metadata import HDF5_FORMAT, INDEX_FILE, STATISTICS_FILE, Metadata, index_bytes
from clt.data.sources import data_folder, open_metadata, read_metadata, verify_checksums
from clt.data.statistics import RunningStatistics, statistics_to_json
from clt.data.stores import LocalActivationStore
from clt.data.writer import ActivationWriter
from clt.errors import DatasetError

BLOCK_TOKENS = 4096


def parts_of(path: str | Path) -> list[Path]:
    """The folders with shards: the one given, or `train` and `held_out` inside it."""
    path = Path(path)
    if data_folder(path) == path:
        return [path]
    return [path / part for part in ("train", "held_out") if (path / part).is_dir()]


def describe(folder: Path) -> str:
    """A few lines about a data set."""
    metadata = read_metadata(folder)
    info = metadata.info
    size = sum((folder / shard.file).stat().st_size for shard in metadata.shards if (folder / shard.file).exists())
    lines = [
        f"{folder}",
        f"  host      {info.model_name}: {info.num_layers} layers x {info.d_model}",
        f"  corpus    {info.dataset} ({info.split})",
        f"  tokens    {metadata.total_tokens:,} in {len(metadata.shards)} shards",
        f"  format    {metadata.format}, {metadata.dtype}",
        f"  size      {size:,} bytes ({size / max(metadata.total_tokens, 1):,.0f} per token)",
    ]
    if metadata.kinds:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in metadata.kinds.items())
        lines.append(f"  kinds     {kinds}")
    if info.hookpoints:
        first = info.hookpoints[0]
        lines.append(f"  read at   {first.input_path} -> {first.output_path}")
    if "mean_cosine" in metadata.codec:
        worst = max(max(values) for values in metadata.codec["relative_squared_error"].values())
        lines.append(f"  int8      largest relative squared error of a layer {worst:.2e}")
    return "\n".join(lines)


def verify(folder: Path) -> int:
    """Check a data set against its manifest and its checksums; returns the number of checksums compared.

    Raises:
        DatasetError: naming everything that is wrong.
    """
    metadata = read_metadata(folder)
    problems = []
    for shard in metadata.shards:
        alone = dataclasses.replace(metadata, shards=(shard,), total_tokens=shard.tokens)
        try:
            open_metadata(folder, alone)
            verify_checksums(folder, alone)
        except DatasetError as error:
            problems.append(str(error))
    if problems:
        raise DatasetError(f"{len(problems)} of {len(metadata.shards)} shards are wrong:\n" + "\n".join(problems))
    return sum(shard.sha256 is not None for shard in metadata.shards)


def drop_chunk(folder: Path, file: str) -> Metadata:
    """Leave a shard out of a data set: manifest, metadata and statistics are made again, the file is deleted.

    Raises:
        DatasetError: there is no such shard, or it is the only one.
    """
    metadata = read_metadata(folder)
    kept = tuple(shard for shard in metadata.shards if shard.file != file)
    if len(kept) == len(metadata.shards):
        names = ", ".join(shard.file for shard in metadata.shards[:5])
        raise DatasetError(f"{folder} has no shard {file!r}. Its first shards are {names}.")
    if not kept:
        raise DatasetError(f"{file} is the only shard of {folder}. Delete the folder instead.")
    smaller = dataclasses.replace(metadata, shards=kept, total_tokens=sum(shard.tokens for shard in kept), kinds={})
    smaller.write(folder)
    write_file(folder / INDEX_FILE, index_bytes(kept))
    (folder / file).unlink(missing_ok=True)
    if metadata.format == HDF5_FORMAT:
        tokens_file(folder / file).unlink(missing_ok=True)
    measure(folder)
    return smaller


def measure(folder: Path) -> None:
    """Compute `norm_stats.json` from the rows."""
    store = LocalActivationStore(folder, batch_size_tokens=BLOCK_TOKENS)
    statistics = RunningStatistics(store.n_layers, store.d_model)
    for rows in store.one_pass():
        stacked = rows.inputs.new_empty(rows.n_tokens, 2, rows.n_layers, rows.d_model)
        stacked[:, 0], stacked[:, 1] = rows.inputs.transpose(0, 1), rows.targets.transpose(0, 1)
        statistics.update(stacked)
    write_file(folder / STATISTICS_FILE, statistics_to_json(statistics.result()).encode())


def convert(source: Path, target: Path, *, codec: Codec, dtype: str | None = None) -> Metadata:
    """Write a data set again in another format or type.

    Rows are shuffled within their shard once more. A new type is rounded to; going on after an interruption works as
    with generation.

    Raises:
        DatasetError: the source is damaged, the target exists, or the disk is full.
    """
    store = LocalActivationStore(source, batch_size_tokens=BLOCK_TOKENS)
    metadata = store.metadata
    info = dataclasses.replace(
        metadata.info, provenance={**metadata.info.provenance, "converted_from": [metadata.format, metadata.dtype]}
    )
    stored_dtype = "bfloat16" if metadata.dtype == "int8" else metadata.dtype
    with ActivationWriter(
        target,
        info,
        dtype=dtype or stored_dtype,
        shard_tokens=metadata.shard_tokens,
        seed=metadata.seed or 0,
        codec=codec,
        resume=True,
    ) as writer:
        for mark, batch in enumerate(store.one_pass()):
            writer.append(batch, mark=mark)
    return read_metadata(target)
