"""`metadata.json`: what a folder of activations holds, who made it and how to check it; and `index.bin` beside it."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from clt.data.files import write_file
from clt.errors import DatasetError
from clt.types import Hookpoint

METADATA_FILE = "metadata.json"
STATISTICS_FILE = "norm_stats.json"
INDEX_FILE = "index.bin"
PROGRESS_FILE = "progress.safetensors"
ROWS_FORMAT = "crosslayer-rows"
HDF5_FORMAT = "hdf5"
FORMAT_VERSION = 1

INDEX_RECORD = np.dtype([("chunk", "<i4"), ("tokens", "<i4"), ("offset", "<i8")])
"""One record of a version-2 `index.bin`: chunk number, its tokens, and the global number of its first row."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a writer is told about the activations it will get."""

    model_name: str
    """Hugging Face id of the host, or its local folder."""
    dataset: str
    """Where the text or the images came from."""
    split: str
    """Split of the corpus."""
    num_layers: int
    d_model: int
    hookpoints: tuple[Hookpoint, ...] = ()
    """Which modules were read, layer by layer."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Everything else worth knowing: tokenizer, context size, options of the command."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One file of rows."""

    file: str
    tokens: int
    sha256: str | None = None
    """None in data sets of the seed projects, which recorded no checksums."""
    tokens_sha256: str | None = None
    """Of the file beside an HDF5 chunk that holds samples, positions and kinds."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The content of `metadata.json`."""

    info: DatasetInfo
    format: str
    dtype: str
    total_tokens: int
    shard_tokens: int
    shards: tuple[ShardRecord, ...]
    seed: int | None = None
    """Seed of the shuffle at writing."""
    kinds: Mapping[str, int] = field(default_factory=dict)
    """Tokens of each kind."""
    codec: Mapping[str, Any] = field(default_factory=dict)
    """What a lossy or compressing codec says about itself."""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    def write(self, folder: Path) -> None:
        """Write `metadata.json`, which makes the folder a finished data set."""
        write_file(folder / METADATA_FILE, (json.dumps(self.to_json(), indent=2) + "\n").encode())

    def to_json(self) -> dict[str, Any]:
        """The seeds' keys first, ours after them."""
        info = self.info
        return {
            "model_name": info.model_name,
            "dataset": info.dataset,
            "split": info.split,
            "num_layers": info.num_layers,
            "d_model": info.d_model,
            "dtype": self.dtype,
            "total_tokens": self.total_tokens,
            "chunk_tokens": self.shard_tokens,
            "created": self.created,
            "format": self.format,
            "format_version": FORMAT_VERSION,
            "codec": dict(self.codec),
            "seed": self.seed,
            "kinds": dict(self.kinds),
            "hookpoints": [hookpoint._asdict() for hookpoint in info.hookpoints],
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "versions": dict(self.versions),
            "provenance": dict(info.provenance),
        }


def metadata_from_json(values: Mapping[str, Any]) -> Metadata:
    """Build from parsed JSON of our own format.

    Raises:
        KeyError, TypeError: a key is missing or has the wrong kind of value.
    """
    info = DatasetInfo(
        model_name=values["model_name"],
        dataset=values["dataset"],
        split=values["split"],
        num_layers=int(values["num_layers"]),
        d_model=int(values["d_model"]),
        hookpoints=tuple(Hookpoint(**entry) for entry in values.get("hookpoints", ())),
        provenance=values.get("provenance", {}),
    )
    return Metadata(
        info=info,
        format=values["format"],
        dtype=values["dtype"],
        total_tokens=int(values["total_tokens"]),
        shard_tokens=int(values["chunk_tokens"]),
        shards=tuple(ShardRecord(**entry) for entry in values["shards"]),
        seed=values.get("seed"),
        kinds=values.get("kinds", {}),
        codec=values.get("codec", {}),
        versions=values.get("versions", {}),
        created=values.get("created", ""),
    )


def read_json(folder: Path) -> dict[str, Any]:
    """The parsed `metadata.json` of a folder.

    Raises:
        DatasetError: there is no such folder, it is unfinished or holds no activations, or the file is damaged.
    """
    path = folder / METADATA_FILE
    if not folder.is_dir():
        raise DatasetError(f"{folder} does not exist. `clt generate` makes a data set of activations.")
    if not path.exists():
        unfinished = (folder / PROGRESS_FILE).exists() or any(folder.glob(".*.tmp"))
        raise DatasetError(
            f"{folder} is unfinished: it has no {METADATA_FILE}, which is written last.\n"
            "Run the `clt generate` command that began it once more; it goes on from the last finished shard."
            if unfinished
            else f"{folder} holds no activations: it has no {METADATA_FILE}.\n"
            f"Give a folder that `clt generate` wrote (one that contains metadata.json, or train/ and held_out/)"
            f"{_below(folder)}."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}). Was it cut off or edited by hand?") from None


def _below(folder: Path) -> str:
    """Data sets a folder or two further down, for whoever gave the folder above them."""
    depths = ("*", "*/*", "*/*/*")
    found = sorted({path.parent.parent for depth in depths for path in folder.glob(f"{depth}/{METADATA_FILE}")})
    return f", such as {', '.join(map(str, found[:3]))}" if found else ""


def index_bytes(shards: tuple[ShardRecord, ...]) -> bytes:
    """A version-2 `index.bin`: one record per chunk, no header, little endian."""
    records = np.zeros(len(shards), dtype=INDEX_RECORD)
    records["chunk"] = np.arange(len(shards))
    records["tokens"] = [shard.tokens for shard in shards]
    records["offset"] = np.cumsum(records["tokens"], dtype=np.int64) - records["tokens"]
    return records.tobytes()


def library_versions() -> dict[str, str]:
    """The versions that can change what is captured."""
    versions = {}
    for package in ("crosslayer", "torch", "transformers", "safetensors", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def now() -> str:
    """The current time in UTC, as the seeds spell it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
