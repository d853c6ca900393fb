"""Examples of features as circuit-tracer's pages fetch them: one file per layer, read by byte ranges.

    features/index.json.gz   gzip of [{"filename": "layer_0.bin", "offsets": [o_0, ..., o_F]}, ...]
    features/layer_0.bin     per feature uint32 length (little endian) and that many bytes of deflated JSON; a feature
                             without examples takes no bytes

Source: circuit-tracer 0.4.1, its local server and page.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clt.errors import GraphError
from clt.types import FeatureId

INDEX = "index.json.gz"


@dataclass(frozen=True)
class Example:
    """A stretch of text with how strongly the feature fired on each token."""

    tokens: Sequence[str]
    activations: Sequence[float]

    def to_dict(self) -> dict[str, Any]:
        """As the pages read it, centred on the strongest token."""
        strongest = max(range(len(self.activations)), key=self.activations.__getitem__)
        return {
            "tokens": list(self.tokens),
            "tokens_acts_list": list(self.activations),
            "train_token_ind": strongest,
            "is_repeated_datapoint": False,
        }


@dataclass(frozen=True)
class FeatureCard:
    """What a page shows of one feature."""

    examples: Mapping[str, Sequence[Example]]
    """Title of a group ("Top activations") -> its examples."""
    top_logits: Sequence[str] = ()
    bottom_logits: Sequence[str] = ()
    frequency: float = 0.0
    """Share of tokens it fires on."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys: histogram, quantile_values, ..."""

    def to_dict(self, layer: int, feature: int, scan: str) -> dict[str, Any]:
        """One record."""
        values = [value for group in self.examples.values() for each in group for value in each.activations]
        groups = [
            {"quantile_name": name, "examples": [each.to_dict() for each in group]}
            for name, group in self.examples.items()
        ]
        return {
            "transcoder_id": scan,
            "index": FeatureId(layer, feature).number,
            "examples_quantiles": groups,
            "top_logits": list(self.top_logits),
            "bottom_logits": list(self.bottom_logits),
            "act_min": min(values, default=0.0),
            "act_max": max(values, default=0.0),
            "activation_frequency": self.frequency,
            **self.extra,
        }


def write_feature_examples(
    cards: Mapping[tuple[int, int], FeatureCard], folder: str | Path, *, n_layers: int, n_features: int, scan: str
) -> Path:
    """Write all cards, by (layer, feature); returns the folder to serve as `features/`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for layer in range(n_layers):
        offsets, parts = [0], []
        for feature in range(n_features):
            card = cards.get((layer, feature))
            if card is not None:
                packed = zlib.compress(json.dumps(card.to_dict(layer, feature, scan)).encode())
                parts.append(struct.pack("<I", len(packed)) + packed)
            offsets.append(offsets[-1] + (0 if card is None else len(parts[-1])))
        name = f"layer_{layer}.bin"
        (folder / name).write_bytes(b"".join(parts))
        index.append({"filename": name, "offsets": offsets})
    (folder / INDEX).write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))
    return folder


def read_feature_example(folder: str | Path, layer: int, feature: int) -> dict[str, Any] | None:
    """One record; None for a feature without examples.

    Raises:
        GraphError: the folder holds no such files, or not this feature.
    """
    folder = Path(folder)
    try:
        entry = json.loads(gzip.decompress((folder / INDEX).read_bytes()))[layer]
        start, end = entry["offsets"][feature : feature + 2]
        if start == end:
            return None
        name = Path(str(entry["filename"])).name
        if name != entry["filename"]:
            raise GraphError(
                f"{folder / INDEX} names {entry['filename']!r}, which is no file of this folder. Not read."
            )
        with open(folder / name, "rb") as file:
            file.seek(start)
            packed = file.read(end - start)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise GraphError(f"{folder} has no examples of feature {feature} of layer {layer} ({error!r}).") from None
    (length,) = struct.unpack("<I", packed[:4])
    return json.loads(zlib.decompress(packed[4 : 4 + length]))
