"""One data set from several writers: each fills a folder of its own, whose shards are then moved together, not copied.

    train/part-00000-of-00002/   shards and progress of the first writer
    train/part-00001-of-00002/   of the second

Every step of the merge may be interrupted and done again: a shard that is not in its part is already at its place.
"""

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from clt.data.hdf5 import tokens_file
from clt.data.metadata import METADATA_FILE, PROGRESS_FILE, DatasetInfo, ShardRecord
from clt.data.progress import Progress, load_progress, save_progress
from clt.data.quantise import QuantisationError
from clt.data.statistics import RunningStatistics
from clt.errors import DatasetError

_NAME = re.compile(r"part-(\d{5})-of-(\d{5})")


def part_folder(folder: Path, part: int, parts: int) -> Path:
    """Where one of `parts` writers of a data set works."""
    return folder / f"part-{part:05d}-of-{parts:05d}"


def require_same_parts(folder: Path, parts: int) -> None:
    """Refuse to go on with a data set that another number of writers has begun.

    Raises:
        DatasetError: naming both numbers.
    """
    matches = [_NAME.fullmatch(path.name) for path in folder.glob("part-*-of-*")]
    begun = sorted({int(match.group(2)) for match in matches if match})
    if not begun and parts > 1 and (folder / PROGRESS_FILE).exists():
        begun = [1]
    if begun and begun != [parts] and not (folder / METADATA_FILE).exists():
        there = " and ".join(str(number) for number in begun)
        raise DatasetError(
            f"{folder} was begun by {there} process{'es' if begun != [1] else ''}, now there {_are(parts)}. Which "
            "batches are done depends on that number: start as many as then (torchrun --nproc-per-node, --nnodes), or "
            "delete the folder."
        )


def merge_parts(folder: Path, parts: int, info: DatasetInfo) -> None:
    """Move the shards of all parts into the folder, first part first, and put their states together.

    What is left to do is what `ActivationWriter(..., resume=True).close()` does: statistics, index, metadata.

    Raises:
        DatasetError: a part or one of its shards is missing.
    """
    statistics = RunningStatistics(info.num_layers, info.d_model)
    states = [_state(part_folder(folder, part, parts), info, statistics) for part in range(parts)]
    records: list[ShardRecord] = []
    for part, state in enumerate(states):
        source = part_folder(folder, part, parts)
        records += [_move(source, record, folder, len(records) + i) for i, record in enumerate(state.shards)]
    progress = dataclasses.replace(
        states[0],
        shards=tuple(records),
        kinds=tuple(sum(counts) for counts in zip(*(state.kinds for state in states), strict=True)),
        mark=max(state.mark for state in states),
        offset=0,
        codec=_merged_codec([state for state in states if state.codec], info.num_layers),
    )
    save_progress(folder, progress, statistics)


def remove_parts(folder: Path, parts: int) -> None:
    """Delete what the writers leave behind once the data set is finished."""
    for part in range(parts):
        shutil.rmtree(part_folder(folder, part, parts), ignore_errors=True)


def _state(folder: Path, info: DatasetInfo, total: RunningStatistics) -> Progress:
    """What one writer did; its statistics are added to the total."""
    own = RunningStatistics(info.num_layers, info.d_model)
    state = load_progress(folder, own)
    if state is None:
        raise DatasetError(
            f"{folder / PROGRESS_FILE} is missing: that process wrote somewhere else. All machines must see the same "
            "--activation-dir (a shared file system)."
        )
    total.merge(own)
    return state


def _move(source: Path, record: ShardRecord, folder: Path, number: int) -> ShardRecord:
    """One shard under its final name."""
    stem, suffix = record.file.split(".", 1)
    final = folder / (f"chunk_{number}.{suffix}" if stem.startswith("chunk_") else f"shard_{number:05d}.{suffix}")
    pairs = [(source / record.file, final)]
    if record.tokens_sha256 is not None:
        pairs.insert(0, (tokens_file(source / record.file), tokens_file(final)))
    for old, new in pairs:
        if old.exists():
            old.replace(new)
        elif not new.exists():
            raise DatasetError(
                f"{old} is missing although its process finished it, and so is {new}. Delete {folder} and generate "
                "anew."
            )
    return dataclasses.replace(record, file=final.name)


def _merged_codec(states: Sequence[Progress], num_layers: int) -> dict:
    if not states:
        return {}
    total = QuantisationError(num_layers)
    for state in states:
        total.merge(QuantisationError(num_layers, state.codec))
    return total.state()


def _are(number: int) -> str:
    return "is 1" if number == 1 else f"are {number}"
