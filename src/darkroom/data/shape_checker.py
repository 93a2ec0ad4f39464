"""Does an image show what a `shapes` caption says? Fixed pixel rules, no learned parts.

1. Background: the median colour of the border. Foreground: pixels further than FOREGROUND from it.
2. Every foreground pixel takes the palette colour of the nearest line from background to colour (an edge pixel is a
   mixture of the two). A connected region of one colour of which enough is left after one erosion is the core of an
   object; cores grow back over the foreground, so touching objects of different colours come apart.
3. Colour of an object: nearest palette entry to the median of the purest part of its core.
4. Shape: the pixels' soft coverage (how far from background to that colour) gives area and centroid, which blur does
   not change; each ideal shape is rendered with them, sharp and blurred, and the highest soft IoU decides.
5. Position: centre of the fitted shape, by the rules in `shape_captions`.

An image passes if it has exactly the objects that the caption names, nothing else, where the caption says.
Lengths are for 64x64 and grow with min(W, H)/64. Shapes: H W image size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from darkroom.data.shape_captions import Caption, parse_caption
from darkroom.data.shape_rendering import AREA, CENTROID_Y, COLOURS, SHAPES, coverage

FOREGROUND = 45.0  # 8-bit RGB distance; half of the smallest distance from a colour to a background
COLOUR_TOLERANCE = 90.0  # an object further than this from every palette colour has no colour of the set
SMALLEST_AREA = 40.0  # pixels; the smallest drawn object has 128
SMALLEST_CORE = 12
BLURS = (0, 2, 5)  # passes of the filter (1, 2, 1)/4, whose standard deviations are 0, 1 and 1.6 pixels
LEAST_OVERLAP = 0.7  # soft IoU below which an object is none of the shapes

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)


@dataclass(frozen=True)
class FoundObject:
    """One object in an image; colour or shape None: nothing of the set. x, y: centre of its bounding box in pixels."""

    colour: str | None
    shape: str | None
    x: float
    y: float
    radius: float
    overlap: float  # soft IoU with the ideal shape


@dataclass(frozen=True)
class CheckResult:
    """Verdict on one image. True in a condition when everything is as the caption says.

    count_ok: as many objects as named.
    colour_ok, shape_ok: these colours or shapes, each as often as named, whichever object has them; ok also needs
    colour and shape on the same object.
    position_ok: position or relation holds for the objects that the caption names; it needs them to be found.
    """

    ok: bool
    count_ok: bool
    colour_ok: bool
    shape_ok: bool
    position_ok: bool
    found: tuple[FoundObject, ...]

    def __bool__(self) -> bool:
        return self.ok


def check_caption(image: np.ndarray, caption: str | Caption) -> CheckResult:
    """Judge an image, uint8 (H, W, 3), against a caption of the `shapes` language."""
    return judge(find_objects(image), caption, (image.shape[1], image.shape[0]))


def judge(found: tuple[FoundObject, ...], caption: str | Caption, size: tuple[int, int]) -> CheckResult:
    """Judge the objects found in an image of (width, height); several captions of one image need only one search."""
    asked = parse_caption(caption) if isinstance(caption, str) else caption
    count_ok = len(found) == len(asked.objects)
    colour_ok = count_ok and sorted(str(f.colour) for f in found) == sorted(o.colour for o in asked.objects)
    shape_ok = count_ok and sorted(str(f.shape) for f in found) == sorted(o.shape for o in asked.objects)
    # The colours of a pair differ, so colour and shape together name at most one found object each.
    named = [next((f for f in found if (f.colour, f.shape) == (o.colour, o.shape)), None) for o in asked.objects]
    complete = [f for f in named if f is not None]
    position_ok = len(complete) == len(named) and _placed(asked, complete, *size)
    return CheckResult(
        ok=count_ok and position_ok,
        count_ok=count_ok,
        colour_ok=colour_ok,
        shape_ok=shape_ok,
        position_ok=position_ok,
        found=found,
    )


def _placed(asked: Caption, found: list[FoundObject], width: int, height: int) -> bool:
    first = found[0]
    if asked.relation is not None:
        dx, dy = found[1].x - first.x, found[1].y - first.y
        along, across = (dx, dy) if "to the" in asked.relation else (dy, dx)
        if asked.relation in ("to the right of", "below"):
            along = -along
        return along > abs(across)
    column, row = first.x * 3 / width, first.y * 3 / height
    return {
        None: True,
        "on the left": column < 1,
        "on the right": column > 2,
        "at the top": row < 1,
        "at the bottom": row > 2,
        "in the center": 1 <= column <= 2 and 1 <= row <= 2,
    }[asked.position]


def find_objects(image: np.ndarray) -> tuple[FoundObject, ...]:
    """All objects in an image, uint8 (H, W, 3), in scan order of their topmost core pixel."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"find_objects wants uint8 (H, W, 3), got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    scale = min(height, width) / 64
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.median(border, axis=0)
    foreground = ((pixels - background) ** 2).sum(-1) > FOREGROUND**2

    cores = _cores(pixels - background, foreground, _PALETTE - background, SMALLEST_CORE * scale**2)
    owner = _grow(cores, foreground, int(np.ceil(4 * scale)))
    found = []
    for number in range(1, int(cores.max()) + 1):
        item = _describe(pixels, background, owner, cores == number, number, scale)
        if item is not None:
            found.append(item)
    # Foreground that belongs to no core (a blot of mixed colours) is an object too: it is not what the caption says.
    regions, areas = _components(foreground & (owner == 0))
    for blot in np.flatnonzero(areas >= SMALLEST_AREA * scale**2) + 1:
        y, x = np.nonzero(regions == blot)
        found.append(FoundObject(None, None, float(x.mean() + 0.5), float(y.mean() + 0.5), len(x) ** 0.5 / 2, 0.0))
    return tuple(found)


def _cores(offsets: np.ndarray, foreground: np.ndarray, palette: np.ndarray, least: float) -> np.ndarray:
    """(H, W) integers: 0, or the number of the core a pixel is in. A core has one palette colour and `least` pixels."""
    y, x = np.nonzero(foreground)
    colour = np.full(foreground.shape, -1)
    # Distance to the segment from the origin (the background) to colour c, up to |p|^2: a^2 |c|^2 - 2 a p.c with
    # a = p.c / |c|^2 clipped to [0, 1]. The colour nearest to the background can be the background itself: length 0.
    lengths = np.maximum((palette**2).sum(1), 1)
    along = offsets[y, x] @ palette.T
    share = np.clip(along / lengths, 0, 1)
    colour[y, x] = (share * share * lengths - 2 * share * along).argmin(1)
    inner = foreground.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(colour, step, axis) == colour
    cores = np.zeros(foreground.shape, np.int64)
    count = 0
    for value in np.unique(colour[inner]):
        regions, areas = _components(colour == value)
        kept = np.bincount(regions[inner], minlength=len(areas) + 1)
        for number in np.flatnonzero(kept[1:] >= least) + 1:
            count += 1
            cores[(regions == number) & inner] = count
    return cores


def _grow(cores: np.ndarray, foreground: np.ndarray, steps: int) -> np.ndarray:
    """Cores spread over the foreground, one pixel a step, first come first served."""
    owner = cores.copy()
    for _ in range(steps):
        padded = np.pad(owner, 1)
        neighbours = np.maximum.reduce([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
        free = (owner == 0) & foreground & (neighbours > 0)
        if not free.any():
            break
        owner[free] = neighbours[free]
    return owner


def _describe(
    pixels: np.ndarray, background: np.ndarray, owner: np.ndarray, core: np.ndarray, number: int, scale: float
) -> FoundObject | None:
    """Colour, shape and place of one object; None if it is too small to count."""
    height, width = owner.shape
    inside = pixels[core]
    depth = ((inside - background) ** 2).sum(1)
    colour = np.median(inside[depth >= np.quantile(depth, 0.6)], axis=0)
    distance = np.sqrt(((_PALETTE - colour) ** 2).sum(1))
    name = _NAMES[int(distance.argmin())] if distance.min() <= COLOUR_TOLERANCE else None

    # Only the object and two pixels around it that are nobody else's take part.
    rows, columns = np.flatnonzero((owner == number).any(1)), np.flatnonzero((owner == number).any(0))
    margin = int(np.ceil(2 * scale))
    y0, y1 = max(int(rows[0]) - margin, 0), min(int(rows[-1]) + 1 + margin, height)
    x0, x1 = max(int(columns[0]) - margin, 0), min(int(columns[-1]) + 1 + margin, width)
    near = owner[y0:y1, x0:x1]
    reach = _grow(np.where(near == number, 1, 0), near == 0, margin) > 0
    axis = colour - background
    share = (pixels[y0:y1, x0:x1] - background) @ axis / max(float(axis @ axis), 1.0)
    # The stretch cuts noise at both ends and keeps the half-way contour, so the area stays.
    covered = np.where(reach | (near == number), _stretch(share), 0).astype(np.float32)
    area = float(covered.sum())
    if area < SMALLEST_AREA * scale**2:
        return None
    cy = float(covered.sum(1) @ (np.arange(y1 - y0) + 0.5)) / area
    cx = float(covered.sum(0) @ (np.arange(x1 - x0) + 0.5)) / area

    best: tuple[float, str, float] = (0.0, SHAPES[0], 0.0)
    for shape in SHAPES:
        radius = float(np.sqrt(area / AREA[shape]))
        ideal = coverage(shape, cx, cy - CENTROID_Y[shape] * radius, radius, (x1 - x0, y1 - y0))
        for passes in BLURS:
            soft = _smoothing(y1 - y0, passes) @ ideal @ _smoothing(x1 - x0, passes) if passes else ideal
            soft = _stretch(soft)
            both = float(np.minimum(soft, covered).sum())
            best = max(best, (both / (float(soft.sum()) + area - both), shape, radius))
    overlap, shape, radius = best
    return FoundObject(
        colour=name,
        shape=shape if overlap >= LEAST_OVERLAP else None,
        x=x0 + cx,
        y=y0 + cy - CENTROID_Y[shape] * radius,
        radius=radius,
        overlap=overlap,
    )


def _stretch(share: np.ndarray) -> np.ndarray:
    return np.clip((share - 0.15) / 0.7, 0, 1)


@lru_cache(maxsize=256)
def _smoothing(length: int, passes: int) -> np.ndarray:
    """(length, length) matrix of `passes` times the filter (1, 2, 1)/4 with zeros outside."""
    step = np.eye(length) / 2 + np.eye(length, k=1) / 4 + np.eye(length, k=-1) / 4
    return np.linalg.matrix_power(step, passes).astype(np.float32)


def _components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-connected components of (H, W) bool: labels (H, W), 0 outside and 1..n inside, and their areas (n,).

    Union-find over the runs of each row: as many Python steps as runs, not pixels.
    """
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(edges == 1)
    stop = np.nonzero(edges == -1)[1]
    parent = list(range(len(row)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    rows, starts, stops = row.tolist(), start.tolist(), stop.tolist()
    above = 0  # first run that can still touch the current one from the row above
    for i in range(len(rows)):
        while rows[above] < rows[i] - 1 or (rows[above] == rows[i] - 1 and stops[above] < starts[i]):
            above += 1
        j = above
        while rows[j] == rows[i] - 1 and starts[j] <= stops[i]:
            one, other = root(i), root(j)
            parent[max(one, other)] = min(one, other)
            j += 1
    roots = [root(i) for i in range(len(rows))]
    numbers = {r: n + 1 for n, r in enumerate(sorted(set(roots)))}
    labels = np.zeros((height, width), np.int64)
    areas = np.zeros(len(numbers))
    for r, y, a, b in zip(roots, rows, starts, stops, strict=True):
        labels[y, a:b] = numbers[r]
        areas[numbers[r] - 1] += b - a
    return labels, areas
