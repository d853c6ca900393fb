"""Look after data sets of activations: info, verify, stats, drop-chunk, convert.

clt data info DIR
clt data verify DIR
clt data verify hf://datasets/OWNER/NAME/FOLDER
clt data convert DIR --output OTHER --output-format hdf5
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from clt.data import maintenance
from clt.data.codecs import Codec
from clt.data.objects import ObjectSource, is_url
from clt.errors import ConfigError

Folder = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class Info:
    """Say what a data set holds."""

    folder: Folder

    def run(self) -> None:
        """Print it, for both parts of a divided data set."""
        for part in maintenance.parts_of(self.folder):
            print(maintenance.describe(part))


@dataclass(frozen=True)
class Verify:
    """Check every shard against the manifest and its checksum."""

    folder: Annotated[str, tyro.conf.Positional]
    """A folder, or the address of one (s3://, gs://, az://, https://, hf://datasets/...), which is read as a stream."""
    sizes_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Of an address: compare sizes, not checksums, so that nothing need be read."""

    def run(self) -> None:
        """Print how much was compared; damage is an error."""
        if is_url(self.folder):
            self._run_remote()
            return
        if self.sizes_only:
            raise ConfigError(f"--sizes-only is for addresses; {self.folder} is a folder here, which is read quickly.")
        for part in maintenance.parts_of(self.folder):
            n_checksums = maintenance.verify(part)
            print(f"{part}: sizes and types agree with the manifest, {n_checksums} checksums agree.")

    def _run_remote(self) -> None:
        source = ObjectSource(self.folder)
        (source.verify_sizes if self.sizes_only else source.verify)()
        shards = source.metadata.shards
        n_checksums = 0 if self.sizes_only else sum(shard.sha256 is not None for shard in shards)
        print(f"{self.folder}: the sizes of {len(shards)} shards agree, {n_checksums} checksums agree.")


@dataclass(frozen=True)
class Stats:
    """Compute norm_stats.json from the rows."""

    folder: Folder

    def run(self) -> None:
        """Write the file for each part."""
        for part in maintenance.parts_of(self.folder):
            maintenance.measure(part)
            print(f"{part}: norm_stats.json written.")


@dataclass(frozen=True)
class DropChunk:
    """Leave a shard out and delete it."""

    folder: Folder
    file: Annotated[str, tyro.conf.Positional]
    """Name of the shard's file."""

    def run(self) -> None:
        """Drop it and say what is left."""
        left = maintenance.drop_chunk(maintenance.data_folder(self.folder), self.file)
        print(f"{self.file} is left out; {left.total_tokens:,} tokens in {len(left.shards)} shards remain.")


@dataclass(frozen=True)
class Convert:
    """Write a data set again in another format or type."""

    folder: Folder
    output: Path
    """New folder."""
    output_format: Literal["safetensors", "hdf5"] = "safetensors"
    """Format of the files."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """Type on disk; None: as it is (int8 becomes bfloat16)."""
    compression: Literal["none", "gzip", "lzf", "lz4"] = "none"
    """Of HDF5 chunks."""

    def run(self) -> None:
        """Convert each part."""
        parts = maintenance.parts_of(self.folder)
        for part in parts:
            target = self.output / part.name if len(parts) > 1 else self.output
            codec = Codec(self.output_format, self.compression)
            metadata = maintenance.convert(part, target, codec=codec, dtype=self.dtype)
            print(f"{target}: {metadata.total_tokens:,} tokens as {metadata.format}, {metadata.dtype}.")


Options = Info | Verify | Stats | DropChunk | Convert


def main(options: Info | Verify | Stats | DropChunk | Convert) -> None:
    """Do what was asked."""
    options.run()
