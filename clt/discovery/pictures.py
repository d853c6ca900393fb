"""The images that feature examples refer to, small and inside the example, so that a page needs no other file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

LARGEST = 224
"""Pixels of the longer side."""


def with_pictures(record: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """A feature's examples with `images` beside each `image_references`: a picture, its grid and its activations.

    Args:
        folders: where images may lie; a reference that leads elsewhere, or to no image, gives a picture without `src`.
    """
    groups = [
        {**group, "examples": [_with_pictures(example, folders) for example in group["examples"]]}
        for group in record.get("examples_quantiles", [])
    ]
    return {**record, "examples_quantiles": groups}


def _with_pictures(example: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    references = [each for each in example.get("image_references") or [] if isinstance(each, Mapping)]
    pictures = []
    for reference in references:
        values = reference.get("patch_activations") or []
        # Hosts cut images into square grids; anything else is drawn as one row.
        side = math.isqrt(len(values))
        rows, columns = (side, side) if side * side == len(values) else (1, len(values))
        source = _data_url(str(reference.get("image") or ""), folders)
        if values:
            pictures.append({"src": source, "rows": rows, "columns": columns, "activations": list(values)})
    return {**example, **({"images": pictures} if pictures else {})}


def _data_url(name: str, folders: Sequence[Path]) -> str:
    for folder in folders:
        path = (folder / name).resolve()
        if not name or not path.is_relative_to(folder.resolve()) or not path.is_file():
            continue
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError):
            continue
        image.thumbnail((LARGEST, LARGEST))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=88)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return ""
