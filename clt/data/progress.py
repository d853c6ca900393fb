"""How far an unfinished data set has come, in one file that is replaced after each shard."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from clt.data.files import write_file
from clt.data.metadata import PROGRESS_FILE, ShardRecord
from clt.data.statistics import RunningStatistics
from clt.errors import DatasetError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The finished shards, and where in the stream of batches their last token was."""

    plan: dict[str, Any]
    """What the data set is made with; another plan may not go on with these shards."""
    shards: tuple[ShardRecord, ...] = ()
    kinds: tuple[int, ...] = (0, 0, 0)
    mark: int = 0
    """The batch that holds the first token not yet in a finished shard."""
    offset: int = 0
    """How many tokens of that batch are in finished shards."""
    codec: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Running measurements of the codec."""


def save_progress(folder: Path, progress: Progress, statistics: RunningStatistics) -> None:
    """Write the whole state in one step."""
    text = json.dumps(dataclasses.asdict(progress))
    tensors = {name: value.contiguous() for name, value in statistics.state().items()}
    write_file(folder / PROGRESS_FILE, save(tensors, metadata={"progress": text}))


def load_progress(folder: Path, statistics: RunningStatistics) -> Progress | None:
    """Read what `save_progress` wrote, statistics included; None if nothing was begun.

    Raises:
        DatasetError: the file is damaged.
    """
    path = folder / PROGRESS_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["progress"])
            statistics.load({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{path} is damaged ({error}). Delete {folder} and generate the data set anew.") from None
    shards = tuple(ShardRecord(**entry) for entry in values.pop("shards"))
    return Progress(shards=shards, kinds=tuple(values.pop("kinds")), **values)


def require_same_plan(where: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix rows made in different ways.

    Raises:
        DatasetError: naming every entry that differs.
    """
    saved, wanted = _flat(saved), _flat(wanted)
    names = sorted(set(saved) | set(wanted))
    different = [
        f"  {name}: {saved.get(name)!r} there, {wanted.get(name)!r} now"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        raise DatasetError(
            f"{where} was made with other options:\n"
            + "\n".join(different)
            + "\nUse the same options, choose another folder, or delete this one."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat
