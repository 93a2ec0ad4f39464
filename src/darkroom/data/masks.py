"""`repaint_mask`: random masks for training inpainting, 1 = repaint.

Rectangles or thick strokes, as in LaMa (Suvorov et al. 2022, sec. 2.3, "wide" masks). Shapes: H W image size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from darkroom.errors import DarkroomError

TRIES = 50


@dataclass(frozen=True)
class RandomMask:
    """share:      the least and the greatest part of the picture that is repainted
    everything: probability that all of it is, so that the model can also begin from nothing (0.25 in SD)
    """

    share: tuple[float, float] = (0.1, 0.5)
    everything: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share[0] < self.share[1] <= 1 or not 0 <= self.everything <= 1:
            raise DarkroomError(
                f"data.repaint_mask: share {list(self.share)}, everything {self.everything:g}; give "
                "0 < least < greatest <= 1, and a probability"
            )


def draw_mask(rng: np.random.Generator, size: tuple[int, int], rule: RandomMask) -> np.ndarray:
    """float32 (1, H, W) of 0 and 1 for a picture of (width, height)."""
    width, height = size
    if rng.random() < rule.everything:
        return np.ones((1, height, width), np.float32)
    mask = np.zeros((height, width), bool)
    draw = _rectangle if rng.random() < 0.5 else _stroke
    for _ in range(TRIES):
        if mask.mean() >= rule.share[0]:
            break
        more = mask | draw(rng, width, height)
        if more.mean() <= rule.share[1]:
            mask = more
    else:  # nothing random fitted between the two shares: a stripe from the top does
        mask[: max(1, round(height * (rule.share[0] + rule.share[1]) / 2))] = True
    return mask[None].astype(np.float32)


def _rectangle(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A rectangle with sides from an eighth to half of the picture's."""
    w, h = (max(1, int(side * rng.uniform(1 / 8, 1 / 2))) for side in (width, height))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    mask = np.zeros((height, width), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def _stroke(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A bent line of one to four pieces, as thick as a twentieth to a tenth of the shorter side on either side."""
    unit = min(width, height)
    radius, turn = unit * rng.uniform(1 / 20, 1 / 10), rng.uniform(0, 2 * np.pi)
    point = np.array([rng.uniform(0, width), rng.uniform(0, height)])
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns, rows], -1) + 0.5
    mask = np.zeros((height, width), bool)
    for _ in range(int(rng.integers(1, 5))):
        turn += rng.uniform(-np.pi / 2, np.pi / 2)
        step = unit * rng.uniform(1 / 8, 1 / 2) * np.array([np.cos(turn), np.sin(turn)])
        # Squared distance of every pixel from the piece of the line.
        along = np.clip((pixels - point) @ step / (step @ step), 0, 1)
        mask |= ((pixels - point - along[..., None] * step) ** 2).sum(-1) <= radius**2
        point = point + step
    return mask
