"""`shapes`: procedural scenes of coloured shapes with caption, class, boxes and label map, exact by construction.

Scene (seed, split, index) is always the same; no file is needed. Lengths below are for a 64x64 image and grow with
min(W, H)/64: one object of 18..30 px or two of 16..24 px on a plain background. What captions can say and which
combinations the train and validation splits leave out: `shape_captions`. Whether an image shows what a caption says:
`check_caption`.

Margins that make every caption unambiguous: a centre stays 1.5 px away from the lines at one and two thirds;
the two objects of a pair are >= 22 px apart along their axis, <= 8 px across it, and never closer than 3 px.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from darkroom.data.shape_captions import (
    OPPOSITE,
    POSITIONS,
    RELATIONS,
    Caption,
    CaptionObject,
    draw_caption,
    held_out,
    parse_caption,
    prompts,
)
from darkroom.data.shape_checker import CheckResult, FoundObject, check_caption, find_objects, judge
from darkroom.data.shape_rendering import BACKGROUNDS, COLOURS, SHAPES, coverage
from darkroom.errors import DarkroomError

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "OPPOSITE",
    "POSITIONS",
    "RELATIONS",
    "SHAPES",
    "VERSION",
    "Caption",
    "CaptionObject",
    "CheckResult",
    "FoundObject",
    "Scene",
    "SceneObject",
    "check_caption",
    "depth_map",
    "draw_scene",
    "find_objects",
    "held_out",
    "judge",
    "parse_caption",
    "prompts",
    "render",
]

VERSION = 1  # part of the data digest: raise it when a change below alters any picture or caption
SMALLEST = 32  # pixels; below that the shapes cannot be told apart
PAIR_SHARE = 0.6  # of the mixed set; pairs are harder and have 28 times as many captions
SPLITS = {"train": 0, "validation": 1, "all": 2}  # "all" includes the held-out combinations


@dataclass(frozen=True)
class SceneObject:
    """A shape with the centre of its bounding box and half its side, in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about one image. The objects stand in the order of the caption."""

    objects: tuple[SceneObject, ...]
    background: str
    caption: str
    size: tuple[int, int]  # width, height

    @property
    def class_label(self) -> int:
        """Shape class of the object that the caption names first."""
        return SHAPES.index(self.objects[0].shape)

    @property
    def boxes(self) -> np.ndarray:
        """float32 (n, 5): shape class, then x0, y0, x1, y1 divided by width and height."""
        width, height = self.size
        rows = [
            (
                SHAPES.index(o.shape),
                (o.x - o.radius) / width,
                (o.y - o.radius) / height,
                (o.x + o.radius) / width,
                (o.y + o.radius) / height,
            )
            for o in self.objects
        ]
        return np.array(rows, np.float32)


def draw_scene(
    index: int, seed: int = 0, split: str = "train", size: tuple[int, int] = (64, 64), kind: str = "mixed"
) -> Scene:
    """Scene number `index` of a split. kind: "single", "pair" or "mixed" (PAIR_SHARE pairs). size: (width, height)."""
    if min(size) < SMALLEST:
        raise DarkroomError(f"shapes of {size[0]}x{size[1]} cannot be told apart; use {SMALLEST}x{SMALLEST} or more")
    rng = np.random.default_rng([seed, SPLITS[split], index])
    if kind == "mixed":
        kind = "pair" if rng.random() < PAIR_SHARE else "single"
    caption = draw_caption(rng, kind)
    while split != "all" and caption.held_out:
        caption = draw_caption(rng, kind)
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    place = _place_single if kind == "single" else _place_pair
    return Scene(place(rng, caption, size), background, str(caption), size)


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 (H, W, 3), and its label map, uint8 (H, W): 0 background, 1.. = 1 + shape class.

    A pixel belongs to the object that covers at least half of it.
    """
    width, height = scene.size
    image = np.empty((height, width, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    labels = np.zeros((height, width), np.uint8)
    for item in scene.objects:
        covered = coverage(item.shape, item.x, item.y, item.radius, scene.size)
        image += covered[..., None] * (np.array(COLOURS[item.colour], np.float32) - image)
        labels[covered >= 0.5] = 1 + SHAPES.index(item.shape)
    return np.rint(image).astype(np.uint8), labels


def depth_map(scene: Scene) -> np.ndarray:
    """float32 (H, W), larger = nearer: 0 background, 1 the object that the caption names first, 1/2 the second. An edge
    pixel lies between, as its colour does."""
    depth = np.zeros((scene.size[1], scene.size[0]), np.float32)
    for number, item in enumerate(scene.objects):
        covered = coverage(item.shape, item.x, item.y, item.radius, scene.size)
        depth += covered * (1 / (1 + number) - depth)
    return depth


def _place_single(rng: np.random.Generator, caption: Caption, size: tuple[int, int]) -> tuple[SceneObject, ...]:
    unit = min(size) / 64
    radius = rng.uniform(9, 15) * unit
    thirds = {  # which third (0, 1, 2; None: any) of x and of y the centre is in
        "on the left": (0, None),
        "on the right": (2, None),
        "at the top": (None, 0),
        "at the bottom": (None, 2),
        "in the center": (1, 1),
        None: (None, None),
    }[caption.position]
    x, y = (_within(rng, length, radius, third, unit) for length, third in zip(size, thirds, strict=True))
    named = caption.objects[0]
    return (SceneObject(named.colour, named.shape, x, y, radius),)


def _within(rng: np.random.Generator, length: int, radius: float, third: int | None, unit: float) -> float:
    """A coordinate in the given third, clear of the border and of the lines between thirds."""
    if third is None:
        third = int(rng.integers(3))
    low = max(third * length / 3 + 1.5 * unit, radius + unit)
    high = min((third + 1) * length / 3 - 1.5 * unit, length - radius - unit)
    return float(rng.uniform(low, high))


def _place_pair(rng: np.random.Generator, caption: Caption, size: tuple[int, int]) -> tuple[SceneObject, ...]:
    unit = min(size) / 64
    radii = rng.uniform(8, 12, size=2) * unit
    horizontal = caption.relation in ("to the left of", "to the right of")
    along, across = size if horizontal else size[::-1]
    # Work in (along, across) with the object of the smaller coordinate first; swap at the end.
    least = max(22 * unit, float(radii.sum()) + 3 * unit)
    room = along - float(radii.sum()) - 2 * unit
    gap = rng.uniform(least, max(least, min(room, 44 * unit)))
    start = rng.uniform(radii[0] + unit, along - radii[1] - unit - gap)
    shift = rng.uniform(-8, 8) * unit
    low = max(radii[0] + unit, radii[1] + unit - shift)
    high = min(across - radii[0] - unit, across - radii[1] - unit - shift)
    side = rng.uniform(low, high)
    points = [(start, side), (start + gap, side + shift)]
    if not horizontal:
        points = [(b, a) for a, b in points]
    named = list(caption.objects)
    if caption.relation in ("to the right of", "below"):
        named.reverse()
    placed = [
        SceneObject(o.colour, o.shape, float(x), float(y), float(r))
        for o, (x, y), r in zip(named, points, radii, strict=True)
    ]
    if caption.relation in ("to the right of", "below"):
        placed.reverse()
    return tuple(placed)
