"""Does an image show what boxes or a label map of `shapes` ask for? By the fixed pixel rules of `shape_checker`.

Objects are found in the image without knowing what was asked. Boxes: as many objects as boxes, and each box has an
object of its class whose bounding square overlaps it by LEAST_OVERLAP or more (intersection over union). Label map: the
map that the found objects make, each as its ideal shape, overlaps the asked one by LEAST_OVERLAP or more, for every
label in either and for the background. Colours are free. Shapes: H W image size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from darkroom.data.shape_checker import FoundObject, find_objects
from darkroom.data.shape_rendering import SHAPES, coverage

LEAST_OVERLAP = 0.5  # of object detection since PASCAL VOC


@dataclass(frozen=True)
class LayoutResult:
    """Verdict on one image; true in a condition when everything is as asked.

    content_ok: the image has exactly the objects (boxes) or the labels (map) that were asked for, wherever they are.
    overlap: the mean over what was asked, 0 for what is missing.
    """

    ok: bool
    content_ok: bool
    overlap: float
    found: tuple[FoundObject, ...]

    def __bool__(self) -> bool:
        return self.ok


def check_boxes(image: np.ndarray, boxes: np.ndarray) -> LayoutResult:
    """Judge an image, uint8 (H, W, 3), against boxes (n, 5): class, x0, y0, x1, y1 divided by width and height."""
    return judge_boxes(find_objects(image), boxes, (image.shape[1], image.shape[0]))


def check_segmentation(image: np.ndarray, labels: np.ndarray) -> LayoutResult:
    """Judge an image, uint8 (H, W, 3), against a label map (H, W): 0 background, 1.. = 1 + shape class."""
    return judge_segmentation(find_objects(image), labels)


def judge_boxes(found: tuple[FoundObject, ...], boxes: np.ndarray, size: tuple[int, int]) -> LayoutResult:
    """Judge the objects found in an image of (width, height); several questions need only one search."""
    squares = np.array([[f.x - f.radius, f.y - f.radius, f.x + f.radius, f.y + f.radius] for f in found]).reshape(-1, 4)
    asked = np.asarray(boxes, np.float64).reshape(-1, 5)
    overlaps = box_overlaps(asked[:, 1:] * np.array([*size, *size]), squares)
    classes = [SHAPES.index(f.shape) if f.shape else -1 for f in found]
    overlaps[asked[:, :1] != np.array(classes)[None, :]] = 0.0
    best = np.zeros(len(asked))
    while overlaps.size and overlaps.max() > 0:  # the best pair first; each box and each object once
        box, item = np.unravel_index(int(overlaps.argmax()), overlaps.shape)
        best[box] = overlaps[box, item]
        overlaps[box, :] = overlaps[:, item] = 0.0
    content_ok = sorted(classes) == sorted(asked[:, 0].astype(int).tolist())
    return LayoutResult(content_ok and bool((best >= LEAST_OVERLAP).all()), content_ok, _mean(best), found)


def judge_segmentation(found: tuple[FoundObject, ...], labels: np.ndarray) -> LayoutResult:
    """Judge the objects found in an image against a label map of its size."""
    drawn = label_map(found, (labels.shape[1], labels.shape[0]))
    either = np.union1d(labels, drawn)
    overlaps = np.array([np.sum((labels == n) & (drawn == n)) / np.sum((labels == n) | (drawn == n)) for n in either])
    # What is none of the shapes has no label, but it was not asked for either.
    content_ok = all(f.shape for f in found) and np.array_equal(np.unique(labels), np.unique(drawn))
    return LayoutResult(content_ok and bool((overlaps >= LEAST_OVERLAP).all()), content_ok, _mean(overlaps), found)


def label_map(found: tuple[FoundObject, ...], size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W): the map of these objects as ideal shapes, for an image of (width, height)."""
    labels = np.zeros((size[1], size[0]), np.uint8)
    for item in found:
        if item.shape is not None:
            labels[coverage(item.shape, item.x, item.y, item.radius, size) >= 0.5] = 1 + SHAPES.index(item.shape)
    return labels


def box_overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n, 4) and (m, 4) boxes x0, y0, x1, y1 -> (n, m) intersection over union."""
    low, high = np.maximum(one[:, None, :2], other[None, :, :2]), np.minimum(one[:, None, 2:], other[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (one, other)]
    overlaps: np.ndarray = both / np.maximum(areas[0][:, None] + areas[1][None, :] - both, 1e-12)
    return overlaps


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 1.0
