"""Drawing a scene: 48 x 48 pixels, three by three cells, a tinted and noisy ground."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from clt.worlds.shapes.scene import CELL_SIZE, COLOURS, IMAGE_SIZE, Scene

NOISE = 0.05
"""Standard deviation of the pixel noise, on the scale where white is 1."""

SUPERSAMPLING = 8
Points = list[tuple[float, float]]


def _turned(n_points: int, radii: tuple[float, ...], start: float = -90.0) -> Points:
    """Points around the centre of the unit square; the radii take turns."""
    angles = (math.radians(start + 360 * point / n_points) for point in range(n_points))
    return [
        (0.5 + radii[place % len(radii)] * math.cos(angle), 0.5 + radii[place % len(radii)] * math.sin(angle))
        for place, angle in enumerate(angles)
    ]


def _heart() -> Points:
    """The usual parametric heart, fitted into the unit square."""
    turn = [2 * math.pi * point / 40 for point in range(40)]
    return [
        (
            0.5 + math.sin(t) ** 3 / 2,
            0.46 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 33,
        )
        for t in turn
    ]


POLYGONS: dict[str, Points] = {
    "square": [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)],
    "hexagon": _turned(6, (0.5,), start=0.0),
    "plus": [
        (0.36, 0),
        (0.64, 0),
        (0.64, 0.36),
        (1, 0.36),
        (1, 0.64),
        (0.64, 0.64),
        (0.64, 1),
        (0.36, 1),
        (0.36, 0.64),
        (0, 0.64),
        (0, 0.36),
        (0.36, 0.36),
    ],
    "star": _turned(10, (0.54, 0.2)),
    "drop": [(0.5, 0), (0.72, 0.42), (0.8, 0.68), (0.68, 0.92), (0.5, 1), (0.32, 0.92), (0.2, 0.68), (0.28, 0.42)],
    "heart": _heart(),
    "diamond": [(0.5, 0), (0.86, 0.5), (0.5, 1), (0.14, 0.5)],
    "cross": [
        (0.18, 0),
        (0.5, 0.32),
        (0.82, 0),
        (1, 0.18),
        (0.68, 0.5),
        (1, 0.82),
        (0.82, 1),
        (0.5, 0.68),
        (0.18, 1),
        (0, 0.82),
        (0.32, 0.5),
        (0, 0.18),
    ],
    "triangle": [(0.5, 0.02), (1, 0.95), (0, 0.95)],
    "house": [
        (0.5, 0),
        (1, 0.42),
        (0.84, 0.42),
        (0.84, 1),
        (0.6, 1),
        (0.6, 0.66),
        (0.4, 0.66),
        (0.4, 1),
        (0.16, 1),
        (0.16, 0.42),
        (0, 0.42),
    ],
    "arrow": [(0, 0.36), (0.5, 0.36), (0.5, 0.06), (1, 0.5), (0.5, 0.94), (0.5, 0.64), (0, 0.64)],
    "bar": [(0, 0.36), (1, 0.36), (1, 0.64), (0, 0.64)],
    "tee": [(0, 0), (1, 0), (1, 0.28), (0.64, 0.28), (0.64, 1), (0.36, 1), (0.36, 0.28), (0, 0.28)],
}

DISCS: dict[str, tuple[tuple[float, float, float, int], ...]] = {
    "circle": ((0.5, 0.5, 0.5, 255),),
    "ring": ((0.5, 0.5, 0.5, 255), (0.5, 0.5, 0.27, 0)),
    "moon": ((0.5, 0.5, 0.5, 255), (0.72, 0.42, 0.4, 0)),
}
"""Kinds made of round parts: centre, radius, and whether the part adds (255) or cuts away (0)."""


@lru_cache(maxsize=256)
def stencil(kind: str, size: int) -> Float[np.ndarray, "row column"]:
    """How much of each pixel a shape covers, smooth at the edges."""
    large = size * SUPERSAMPLING
    canvas = Image.new("L", (large, large), 0)
    pen = ImageDraw.Draw(canvas)
    if kind in POLYGONS:
        pen.polygon([(x * (large - 1), y * (large - 1)) for x, y in POLYGONS[kind]], fill=255)
    for x, y, radius, ink in DISCS.get(kind, ()):
        pen.ellipse([(x - radius) * large, (y - radius) * large, (x + radius) * large, (y + radius) * large], fill=ink)
    blocks = np.asarray(canvas, dtype=np.float32).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3)) / 255


def pixels(scene: Scene) -> UInt8[np.ndarray, "row column channel"]:
    """The scene's picture as bytes; the noise belongs to the scene, so it is always the same."""
    picture = np.broadcast_to(np.array(scene.background, dtype=np.float32), (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    for thing in scene.things:
        row, column = divmod(thing.cell, IMAGE_SIZE // CELL_SIZE)
        top, left = row * CELL_SIZE + thing.offset[0], column * CELL_SIZE + thing.offset[1]
        cover = stencil(thing.kind, thing.size)[:, :, None] * np.float32(thing.opacity)
        window = picture[top : top + thing.size, left : left + thing.size]
        window += cover * (np.array(COLOURS[thing.colour], dtype=np.float32) - window)
    noise = np.random.default_rng(scene.noise_seed).standard_normal(picture.shape, dtype=np.float32)
    return np.rint(np.clip(picture + NOISE * noise, 0, 1) * 255).astype(np.uint8)


def draw(scene: Scene) -> Image.Image:
    """The scene's picture."""
    return Image.fromarray(pixels(scene))
