"""Ideal shapes: exact geometry and anti-aliased coverage. Pixel i covers [i, i+1), so positions are continuous.

Shapes: H W image size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
# At least 97 apart from one another and from every background (Euclidean, 8-bit RGB): an autoencoder that loses a
# quarter of that still leaves the nearest colour the right one.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 35),
    "green": (20, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (250, 225, 30),
    "purple": (130, 30, 160),
    "orange": (250, 130, 10),
    "cyan": (40, 210, 225),
    "pink": (255, 105, 180),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "charcoal": (64, 64, 64),
    "silver": (200, 200, 200),
    "white": (255, 255, 255),
}

ARM = 0.36  # half-width of a cross's arm, hole radius of a ring: fractions of the half-size
HOLE = 0.5
SUPERSAMPLE = 4

# Area and centroid in units of the half-size, from the definitions in `inside`.
AREA = {
    "circle": np.pi,
    "square": 4.0,
    "triangle": 2.0,
    "diamond": 2.0,
    "cross": 8 * ARM - 4 * ARM**2,
    "ring": np.pi * (1 - HOLE**2),
}
CENTROID_Y = {name: 1 / 3 if name == "triangle" else 0.0 for name in SHAPES}


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> Any:
    """Whether points are in the unit shape, whose bounding box is [-1, 1] x [-1, 1] (y downwards)."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return (abs(x) <= 1) & (abs(y) <= 1)
    if shape == "triangle":
        return (abs(x) <= (y + 1) / 2) & (y <= 1)
    if shape == "diamond":
        return abs(x) + abs(y) <= 1
    if shape == "cross":
        return ((abs(x) <= ARM) & (abs(y) <= 1)) | ((abs(y) <= ARM) & (abs(x) <= 1))
    if shape == "ring":
        square = x * x + y * y
        return (square <= 1) & (square >= HOLE**2)
    raise ValueError(f"unknown shape {shape!r}")


def coverage(shape: str, x: float, y: float, radius: float, size: tuple[int, int]) -> np.ndarray:
    """Share of each pixel that the shape covers: float32 (H, W) in [0, 1], from SUPERSAMPLE^2 samples a pixel.

    x, y: centre of the bounding box in pixels; radius: half of its side; size: (width, height).
    """
    width, height = size
    out = np.zeros((height, width), np.float32)
    x0, x1 = max(int(np.floor(x - radius)), 0), min(int(np.ceil(x + radius)), width)
    y0, y1 = max(int(np.floor(y - radius)), 0), min(int(np.ceil(y + radius)), height)
    if x0 >= x1 or y0 >= y1:
        return out
    n = SUPERSAMPLE
    px = (np.arange((x1 - x0) * n) + 0.5) / n + (x0 - x)
    py = (np.arange((y1 - y0) * n) + 0.5) / n + (y0 - y)
    hit = inside(shape, px[None, :] / radius, py[:, None] / radius)
    out[y0:y1, x0:x1] = hit.reshape(y1 - y0, n, x1 - x0, n).mean((1, 3), dtype=np.float32)
    return out
