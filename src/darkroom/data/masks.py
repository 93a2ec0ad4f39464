"""`repaint_mask`: random masks for training inpainting, 1 = repaint.

The kinds are those of LaMa (Suvorov et al. 2022, sec. 2.3 and its released settings for 256x256 pixels, here as parts
of the shorter side): strokes that are thin, medium or thick, and boxes; and borders, as outpainting has them. LaMa
draws a random number of strokes and takes the share of the picture that comes out. Here the share is drawn first and
strokes are added until it is reached, so that "40 to 50 %" is a rule like any other. Shapes: H W image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from darkroom.errors import DarkroomError

TRIES = 50  # shapes in a row that change nothing, or too much


@dataclass(frozen=True)
class RandomMask:
    """share:      the least and the greatest part of the picture that is repainted, evenly drawn from between them
    everything: probability that all of it is, so that the model can also begin from nothing (0.25 in SD)
    thin, medium, thick, boxes, borders: how often masks are of each kind, relative to the others. A border is what lies
        outside of a rectangle
    """

    share: tuple[float, float] = (0.1, 0.5)
    everything: float = 0.0
    thin: float = 1.0
    medium: float = 1.0
    thick: float = 1.0
    boxes: float = 1.0
    borders: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share[0] < self.share[1] <= 1 or not 0 <= self.everything <= 1:
            raise DarkroomError(
                f"data.repaint_mask: share {list(self.share)}, everything {self.everything:g}; give "
                "0 < least < greatest <= 1, and a probability"
            )
        if min(self.odds) < 0 or sum(self.odds) <= 0:
            raise DarkroomError(
                f"data.repaint_mask: {', '.join(f'{k} {odds:g}' for k, odds in zip(KINDS, self.odds, strict=True))}; "
                "give numbers from 0 on, not all of them 0"
            )

    @property
    def odds(self) -> tuple[float, ...]:
        """In the order of `KINDS`."""
        return tuple(getattr(self, kind) for kind in KINDS)


def draw_mask(rng: np.random.Generator, size: tuple[int, int], rule: RandomMask) -> np.ndarray:
    """float32 (1, H, W) of 0 and 1 for a picture of (width, height)."""
    width, height = size
    if rng.random() < rule.everything:
        return np.ones((1, height, width), np.float32)
    odds = np.array(rule.odds)
    kind = list(KINDS)[int(rng.choice(len(odds), p=odds / odds.sum()))]
    least, greatest = rule.share
    wanted = rng.uniform(least, greatest)
    mask = np.zeros((height, width), bool)
    add = KINDS[kind]
    if add is None:
        _add_border(mask, rng, wanted)
    else:
        _grow(mask, rng, add, wanted, greatest)
    if not least <= mask.mean() <= greatest:  # nothing random fitted between the two shares: a stripe from the top does
        mask[:] = False
        mask[: max(1, round(height * (least + greatest) / 2))] = True
    return mask[None].astype(np.float32)


Add = Callable[[np.ndarray, np.random.Generator], None]


def _grow(mask: np.ndarray, rng: np.random.Generator, add: Add, wanted: float, greatest: float) -> None:
    """Add shapes until they cover the share that is wanted, none that makes it more than the greatest."""
    failures = 0
    while mask.mean() < wanted and failures < TRIES:
        more = mask.copy()
        add(more, rng)
        fits = more.mean() <= greatest and more.sum() > mask.sum()
        failures = 0 if fits else failures + 1
        if fits:
            mask |= more


@dataclass(frozen=True)
class _Stroke:
    """A bent line of one to `pieces` pieces, round at its joints; lengths and widths in parts of the shorter side."""

    width: tuple[float, float]
    length: tuple[float, float]
    pieces: int = 5

    def __call__(self, mask: np.ndarray, rng: np.random.Generator) -> None:
        height, width = mask.shape
        unit = min(width, height)
        # A pixel's centre is never farther than 0.71 from a point inside of it: every stroke then covers something.
        radius = max(0.75, unit * rng.uniform(*self.width) / 2)
        point = np.array([rng.uniform(0, width), rng.uniform(0, height)])
        turn = rng.uniform(0, 2 * np.pi)
        for _ in range(int(rng.integers(1, self.pieces + 1))):
            end = point + unit * rng.uniform(*self.length) * np.array([np.cos(turn), np.sin(turn)])
            _add_line(mask, point, end, radius)
            # Nearly back to where it came from, as LaMa's strokes do: they are scribbles rather than paths.
            turn += np.pi + rng.uniform(-np.pi / 2, np.pi / 2) if rng.random() < 0.5 else rng.uniform(-1, 1)
            point = end


def _add_line(mask: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> None:
    """Every pixel whose centre is at most `radius` from the line between two points (x, y)."""
    height, width = mask.shape
    low = np.floor(np.minimum(start, end) - radius).astype(int)
    high = np.ceil(np.maximum(start, end) + radius).astype(int)
    left, right = (int(np.clip(v, 0, width)) for v in (low[0], high[0]))
    top, bottom = (int(np.clip(v, 0, height)) for v in (low[1], high[1]))
    x = np.arange(left, right) + 0.5 - start[0]
    y = (np.arange(top, bottom) + 0.5 - start[1])[:, None]
    (dx, dy) = end - start
    along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
    near = (x - along * dx) ** 2 + (y - along * dy) ** 2 <= radius**2
    mask[top:bottom, left:right] |= near


def _add_box(mask: np.ndarray, rng: np.random.Generator) -> None:
    """A rectangle with sides from an eighth to three fifths of the picture's."""
    height, width = mask.shape
    w, h = (max(1, int(side * rng.uniform(1 / 8, 3 / 5))) for side in (width, height))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    mask[y : y + h, x : x + w] = True


def _add_border(mask: np.ndarray, rng: np.random.Generator, wanted: float) -> None:
    """What lies outside of a rectangle, at one to four sides of the picture, together the share that is wanted."""
    height, width = mask.shape
    sides = rng.random(4) * (rng.random(4) < 0.5)  # left, top, right, bottom
    if not sides.any():
        sides[rng.integers(4)] = 1
    # The rectangle's sides are the picture's times u and v with u * v = 1 - wanted.
    kept = 1 - wanted
    across, along = sides[0] + sides[2], sides[1] + sides[3]
    u = kept ** (across / (across + along))
    left, top = (width * (1 - u) * sides[0] / max(across, 1e-9), height * (1 - kept / u) * sides[1] / max(along, 1e-9))
    x0, y0 = round(left), round(top)
    x1, y1 = round(left + width * u), round(top + height * kept / u)
    inside = np.zeros_like(mask)
    inside[y0:y1, x0:x1] = True
    mask |= ~inside


# LaMa's strokes are up to 15, 55 and 105 of 256 pixels wide, but at least 5 in all three: here the kinds do not overlap
# as much. Its pieces are up to 50, 110 and 210 long. None: borders are not a sum of shapes.
KINDS: dict[str, Add | None] = {
    "thin": _Stroke(width=(5 / 256, 15 / 256), length=(10 / 256, 50 / 256)),
    "medium": _Stroke(width=(15 / 256, 55 / 256), length=(10 / 256, 110 / 256)),
    "thick": _Stroke(width=(40 / 256, 105 / 256), length=(10 / 256, 210 / 256)),
    "boxes": _add_box,
    "borders": None,
}
