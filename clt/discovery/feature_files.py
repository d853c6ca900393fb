"""Reading feature examples in the public format, wherever they lie in a folder.

Two layouts: circuit-tracer's `index.json.gz` with one binary file per layer (each record a little-endian uint32
length and zlib-deflated JSON), and one `{number}.json` per feature, the number pairing layer and feature after
Cantor. Both as described in docs/graphs.md, section "Feature examples".
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from clt.errors import DatasetError
from clt.types import FeatureId

INDEX = "index.json.gz"
_MOST_BYTES = 64 * 2**20
"""A record that inflates to more is no feature's examples."""


class FeatureFiles:
    """The examples of a transcoder's features."""

    def __init__(self, folder: Path) -> None:
        """Look what is there; nothing is read yet.

        Raises:
            DatasetError: the folder is missing or holds no examples.
        """
        self.folder = folder
        if not folder.is_dir():
            raise DatasetError(f"{folder} does not exist. Give the folder with feature examples.")
        if (folder / "features" / INDEX).exists():
            self.folder = folder / "features"
        if not self._is_binary and next(self._numbered(), None) is None:
            raise DatasetError(
                f"{folder} holds no feature examples: neither {INDEX} nor files such as 1234.json. Give the folder "
                "that directly holds them."
            )

    @property
    def _is_binary(self) -> bool:
        return (self.folder / INDEX).exists()

    def _numbered(self) -> Iterator[Path]:
        return (path for path in self.folder.glob("*.json") if path.stem.isdigit())

    @cached_property
    def _index(self) -> list[dict[str, Any] | None]:
        try:
            index = json.loads(gzip.decompress((self.folder / INDEX).read_bytes()))
            entries = list(index.values()) if isinstance(index, dict) else list(index)
            if isinstance(index, dict):
                entries = [index.get(str(layer)) for layer in range(max(map(int, index), default=-1) + 1)]
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise DatasetError(f"{self.folder / INDEX} cannot be read ({error}). Write the examples again.") from None
        return entries

    def features(self) -> list[FeatureId]:
        """All features that have examples, by layer and number."""
        if not self._is_binary:
            return sorted(FeatureId.from_number(int(path.stem)) for path in self._numbered())
        return [
            FeatureId(layer, feature)
            for layer, entry in enumerate(self._index)
            if entry
            for feature, (start, end) in enumerate(zip(entry["offsets"], entry["offsets"][1:]))
            if end > start
        ]

    def read(self, layer: int, feature: int) -> dict[str, Any] | None:
        """One feature's examples as the public format has them; None if there are none.

        Raises:
            DatasetError: the file is damaged.
        """
        if self._is_binary:
            return self._read_record(layer, feature)
        path = self.folder / f"{FeatureId(layer, feature).number}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DatasetError(f"{path} is no whole JSON file ({error}). Write the examples again.") from None

    def _read_record(self, layer: int, feature: int) -> dict[str, Any] | None:
        entry = self._index[layer] if 0 <= layer < len(self._index) else None
        offsets = entry["offsets"] if entry else []
        if not entry or not 0 <= feature < len(offsets) - 1 or offsets[feature] >= offsets[feature + 1]:
            return None
        path = self.folder / Path(entry["filename"]).name  # never a path out of the folder
        try:
            with path.open("rb") as file:
                file.seek(offsets[feature])
                record = file.read(min(offsets[feature + 1] - offsets[feature], _MOST_BYTES))
            (length,) = struct.unpack_from("<I", record)
            text = zlib.decompressobj().decompress(record[4 : 4 + length], _MOST_BYTES)
            return json.loads(text)
        except (OSError, struct.error, zlib.error, ValueError) as error:
            raise DatasetError(
                f"{path}: the record of feature {layer}/{feature} cannot be read ({error}). Write the examples again."
            ) from None
