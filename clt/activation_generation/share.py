"""Which batches of a capture are whose, when torchrun starts several processes; and what they must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clt.config import ActivationConfig
from clt.data.codecs import Codec
from clt.data.metadata import METADATA_FILE, DatasetInfo
from clt.data.parts import merge_parts, part_folder, remove_parts, require_same_parts
from clt.data.writer import ActivationWriter
from clt.errors import ConfigError
from clt.parallel.collectives import agreed, first_difference
from clt.parallel.mesh import Mesh, mesh_of_one, own_device


@dataclass(frozen=True)
class Share:
    """This process's part of a capture; alone, all of it."""

    mesh: Mesh

    @staticmethod
    def of(mesh: Mesh | None) -> Share:
        """Of a mesh; None: of a process alone."""
        return Share(mesh_of_one("cpu") if mesh is None else mesh)

    @property
    def is_whole(self) -> bool:
        """Whether nobody else takes part."""
        return self.mesh.is_alone

    def owns(self, mark: int) -> bool:
        """Whether batch number `mark` is this rank's: every rank has each n-th."""
        return mark % self.mesh.size == self.mesh.rank

    def device(self, config: ActivationConfig) -> str | None:
        """Where this rank's host runs."""
        return own_device(self.mesh, config.device) if config.device_map is None else config.device

    def require_same_options(self, config: ActivationConfig) -> None:
        """Refuse to begin if ranks were started with different options.

        Raises:
            ConfigError: on every rank, naming what differs.
        """
        own = {name: value for name, value in config.to_dict().items() if name != "device"}
        found = first_difference(self.mesh.world, own, "the options of all ranks")
        if found is not None:
            rank, values = found
            raise ConfigError(
                f"Rank {rank} was started with other options than rank 0:\n"
                + "".join(f"  {name}: {first!r} on rank 0, {its!r} there\n" for name, (first, its) in values.items())
                + "All ranks of one capture need the same command line."
            )

    def require_same_count(self, folders: Sequence[Path]) -> None:
        """Refuse to go on with what another number of ranks began.

        Raises:
            DatasetError: naming both numbers.
        """
        for folder in folders:
            require_same_parts(folder, self.mesh.size)

    def folder(self, folder: Path) -> Path:
        """Where this rank writes what will end in `folder`."""
        return folder if self.is_whole else part_folder(folder, self.mesh.rank, self.mesh.size)

    @property
    def part(self) -> int | None:
        """The writer's part; None: it writes everything."""
        return None if self.is_whole else self.mesh.rank

    def count(self, tokens: int) -> int:
        """Tokens of all ranks together."""
        return sum(self.mesh.world.collect(tokens, "the number of tokens"))

    def merge(self, folder: Path, info: DatasetInfo, codec: Codec, **options: Any) -> None:
        """Make one data set of all parts, on rank 0, once everybody is done.

        Args:
            folder: where the data set goes.
            info: what it holds.
            codec: its format.
            options: dtype, shard_tokens and seed, as for `ActivationWriter`.

        Raises:
            DatasetError: on every rank, if it cannot be made.
        """

        def work() -> None:
            if not (folder / METADATA_FILE).exists():
                merge_parts(folder, self.mesh.size, info)
                ActivationWriter(folder, info, codec=codec, resume=True, **options).close()
            remove_parts(folder, self.mesh.size)

        self.mesh.barrier("all parts")
        agreed(self.mesh.world, work, "the merge of all parts")
