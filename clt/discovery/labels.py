"""Labels of a transcoder's features: one small JSON file, written by `clt explain` and by readers of graphs.

{"format": "crosslayer-labels", "format_version": 1,
 "labels": {"layer/feature": {"text": str, "source": str, "detection": float | null, "fuzzing": float | null}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from clt.config.base import write_text_atomically
from clt.errors import DatasetError

LABELS_FILE = "labels.json"
"""What `clt explain` writes."""
BY_HAND_FILE = "labels_by_hand.json"
"""What readers of graphs wrote; these go before all others."""
READER = "reader"
_FORMAT, _VERSION = "crosslayer-labels", 1


@dataclass(frozen=True, kw_only=True)
class FeatureLabel:
    """What a feature stands for, who says so, and how well it predicts where the feature fires."""

    text: str
    source: str
    """`reader`, or the model that wrote it."""
    detection: float | None = None
    """Balanced accuracy of telling from the label which texts the feature fires in; 0.5 is chance."""
    fuzzing: float | None = None
    """Balanced accuracy of telling rightly from wrongly marked tokens; 0.5 is chance."""


def read_labels(path: Path) -> dict[str, FeatureLabel]:
    """Labels by "layer/feature"; empty if there is no file.

    Raises:
        DatasetError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["format_version"] != _VERSION:
            raise ValueError(f"format {content['format']!r}, version {content['format_version']!r}")
        return {key: FeatureLabel(**label) for key, label in content["labels"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is no file of labels this version reads ({type(error).__name__}: {error}). Move it away to start "
            "a new one."
        ) from None


def write_labels(path: Path, labels: Mapping[str, FeatureLabel]) -> None:
    """Write all labels, by layer and feature."""
    ordered = sorted(labels, key=lambda key: tuple(map(int, key.split("/"))))
    content = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "labels": {key: asdict(labels[key]) for key in ordered},
    }
    write_text_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
