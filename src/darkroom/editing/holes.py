"""Where a mask has holes, and the windows of a picture in which they are repainted.

A model that was trained at 128x128 repaints best what it sees at about that size. So a hole is repainted in a window
around it, with as much of its surroundings, and with it what else lies in there; holes that are long but thin (what
outpainting adds) in several, one after the other; and holes that are too large for this in a window that is made
smaller.
Shapes: H W picture. Boxes: left, top, right, bottom in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Box = tuple[int, int, int, int]
LEAST_KNOWN = 0.4  # share of a window that must be known for a long hole to be repainted in parts


@dataclass(frozen=True)
class Hole:
    """What is repainted in some cells of `reach` pixels a side: cells (rows, columns) bool; box: around its pixels."""

    cells: np.ndarray
    reach: int
    box: Box

    def of(self, mask: np.ndarray, box: Box) -> np.ndarray:
        """mask (H, W) bool -> (h, w) bool: its pixels in a box."""
        left, top, right, bottom = box
        rows, columns = np.arange(top, bottom) // self.reach, np.arange(left, right) // self.reach
        return cut(mask, box) & self.cells[np.ix_(rows, columns)]


@dataclass(frozen=True)
class Window:
    """box: what the model sees; target: the part of it in which it repaints the hole."""

    box: Box
    target: Box
    hole: Hole

    def own(self, mask: np.ndarray) -> np.ndarray:
        """mask (H, W) bool of the picture -> (h, w) bool of the window: what is repainted here."""
        left, top, _, _ = self.box
        x0, y0, x1, y1 = self.target
        own = np.zeros_like(cut(mask, self.box))
        own[y0 - top : y1 - top, x0 - left : x1 - left] = self.hole.of(mask, self.target)
        return own


def cut(values: np.ndarray, box: Box) -> np.ndarray:
    """The part of (H, W, ...) in a box."""
    return values[box[1] : box[3], box[0] : box[2]]


def windows_of(mask: np.ndarray, side: int, largest: int) -> list[Window]:
    """For a mask (H, W) bool of what is repainted: windows in the order in which to do it.

    side: at which the model was trained; largest: of windows that are not made smaller.
    """
    waiting = holes_of(mask, max(1, side // 4))
    windows: list[Window] = []
    while waiting:
        hole, *waiting = waiting
        extent = max(hole.box[2] - hole.box[0], hole.box[3] - hole.box[1])
        box = around(hole.box, max(side, 2 * extent), mask.shape)
        if max(box[2] - box[0], box[3] - box[1]) > largest:
            windows += _parts(hole, mask, largest) or [Window(box, hole.box, hole)]
            continue
        together = [other for other in waiting if _inside(other.box, box)]
        waiting = [other for other in waiting if not _inside(other.box, box)]
        cells = np.logical_or.reduce([hole.cells, *(other.cells for other in together)])
        windows.append(Window(box, box if together else hole.box, Hole(cells, hole.reach, box)))
    return windows


def _parts(hole: Hole, mask: np.ndarray, largest: int) -> list[Window]:
    """Squares that cover a hole, each in a window of `largest` and three quarters as wide; none where too little is
    known around one."""
    parts, side = [], max(1, largest * 3 // 4)
    left, top, right, bottom = hole.box
    for y in range(top, bottom, side):
        for x in range(left, right, side):
            target = (x, y, min(x + side, right), min(y + side, bottom))
            if not hole.of(mask, target).any():
                continue
            box = around(target, largest, mask.shape)
            if (~cut(mask, box)).mean() < LEAST_KNOWN:
                return []
            parts.append(Window(box, target, hole))
    return parts


def _inside(box: Box, other: Box) -> bool:
    return box[0] >= other[0] and box[1] >= other[1] and box[2] <= other[2] and box[3] <= other[3]


def box_of(hole: np.ndarray) -> Box:
    """The smallest box around what is True in (H, W)."""
    rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def around(box: Box, side: int, shape: tuple[int, ...]) -> Box:
    """A square of `side` with a box in its middle, moved to lie in a picture of (H, W), cut where that is smaller."""
    starts = []
    for low, high, length in ((box[0], box[2], shape[1]), (box[1], box[3], shape[0])):
        start = (low + high - side) // 2
        starts.append(max(0, min(start, length - side)))
    return starts[0], starts[1], min(starts[0] + side, shape[1]), min(starts[1] + side, shape[0])


def holes_of(mask: np.ndarray, reach: int) -> list[Hole]:
    """The holes of a mask (H, W), from the top: pixels in touching cells of `reach` pixels a side are one hole."""
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % reach), (0, -width % reach)))
    left = np.asarray(padded.reshape(padded.shape[0] // reach, reach, -1, reach).any((1, 3)))
    holes = []
    for row, column in np.argwhere(left).tolist():
        if not left[row, column]:
            continue
        cells = np.zeros_like(left)
        left[row, column] = False
        waiting = [(row, column)]
        while waiting:
            y, x = waiting.pop()
            cells[y, x] = True
            near = left[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
            waiting += [(max(0, y - 1) + dy, max(0, x - 1) + dx) for dy, dx in np.argwhere(near).tolist()]
            near[:] = False
        x0, y0, x1, y1 = (reach * n for n in box_of(cells))
        rough = Hole(cells, reach, (x0, y0, min(x1, width), min(y1, height)))
        exact = box_of(rough.of(mask, rough.box))
        holes.append(Hole(cells, reach, (x0 + exact[0], y0 + exact[1], x0 + exact[2], y0 + exact[3])))
    return holes
