"""How the rows of a finished shard become the file that stays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clt.data import hdf5
from clt.data.files import replace_file, sha256_of
from clt.data.metadata import HDF5_FORMAT, ROWS_FORMAT, ShardRecord
from clt.data.rows import RowFile, RowLayout
from clt.errors import ConfigError

OutputFormat = Literal["safetensors", "hdf5"]
Compression = Literal["none", "gzip", "lzf", "lz4"]


@dataclass(frozen=True)
class Codec:
    """A format, and its compression where it has one.

    Raises:
        ConfigError: a combination that does not exist, or a filter that is not installed.
    """

    output_format: OutputFormat = "safetensors"
    compression: Compression = "none"

    def __post_init__(self) -> None:
        if self.output_format == "safetensors" and self.compression != "none":
            raise ConfigError(
                f"compression = {self.compression!r} needs output_format = 'hdf5'; rows in safetensors are memory-"
                "mapped and never compressed. `dtype = 'int8'` halves them."
            )
        hdf5.compression_options(self.compression)

    @property
    def format_name(self) -> str:
        """What metadata.json calls it."""
        return ROWS_FORMAT if self.output_format == "safetensors" else HDF5_FORMAT

    @property
    def pattern(self) -> str:
        """Matches the files of finished shards."""
        return "shard_*.safetensors" if self.output_format == "safetensors" else "chunk_*.*"

    def describe(self) -> dict[str, Any]:
        """For metadata.json."""
        return {"compression": self.compression} if self.output_format == "hdf5" else {}

    def seal(self, scratch: Path, layout: RowLayout, tokens: int, number: int) -> ShardRecord:
        """Turn a finished file of rows into the shard, under its final name; the scratch file is gone afterwards."""
        folder = scratch.parent
        if self.output_format == "safetensors":
            final = folder / f"shard_{number:05d}.safetensors"
            checksum = sha256_of(scratch)
            replace_file(scratch, final)
            return ShardRecord(file=final.name, tokens=tokens, sha256=checksum)
        final = folder / f"chunk_{number}.hdf5"
        chunk, beside = (folder / f".{name}.tmp" for name in (final.name, hdf5.tokens_file(final).name))
        rows = RowFile(scratch, layout, tokens)
        hdf5.write_tokens(beside, rows)
        hdf5.write_chunk(chunk, rows, self.compression)
        record = ShardRecord(file=final.name, tokens=tokens, sha256=sha256_of(chunk), tokens_sha256=sha256_of(beside))
        replace_file(beside, hdf5.tokens_file(final))
        replace_file(chunk, final)
        scratch.unlink()
        return record
