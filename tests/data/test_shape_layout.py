"""Whether boxes and maps are obeyed: true scenes pass, every kind of disobedience fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from darkroom.data.shape_layout import (
    box_overlaps,
    check_boxes,
    check_segmentation,
    judge_boxes,
    judge_segmentation,
    label_map,
)
from darkroom.data.shapes import Scene, SceneObject, draw_scene, find_objects, render

CIRCLE = SceneObject("red", "circle", 20.0, 20.0, 10.0)
SQUARE = SceneObject("blue", "square", 44.0, 40.0, 10.0)


def scene(*objects: SceneObject) -> Scene:
    return Scene(objects, "white", "", (64, 64))


def test_true_scenes_pass() -> None:
    for index in range(60):
        drawn = draw_scene(index, split="validation")
        image, labels = render(drawn)
        boxes, map_ = check_boxes(image, drawn.boxes), check_segmentation(image, labels)
        assert boxes and map_ and boxes.content_ok and map_.content_ok
        assert boxes.overlap > 0.85 and map_.overlap > 0.85


@pytest.mark.parametrize(
    ("drawn", "content_ok"),
    [
        ((replace(CIRCLE, x=30.0),), True),  # 10 of 20 pixels away: a third
        ((replace(CIRCLE, shape="diamond"),), False),
        ((CIRCLE, SQUARE), False),
        ((), False),
        ((replace(CIRCLE, radius=6.5),), True),  # too small: 0.42 of the square
    ],
)
def test_disobedience_fails(drawn: tuple[SceneObject, ...], content_ok: bool) -> None:
    asked = scene(CIRCLE)
    image = render(scene(*drawn))[0]
    for result in (check_boxes(image, asked.boxes), check_segmentation(image, render(asked)[1])):
        assert not result and result.content_ok == content_ok


def test_colours_are_free_and_small_shifts_pass() -> None:
    image = render(scene(replace(CIRCLE, colour="green", x=22.0), SQUARE))[0]
    asked = scene(SQUARE, CIRCLE)  # in any order
    assert check_boxes(image, asked.boxes) and check_segmentation(image, render(asked)[1])


def test_two_boxes_of_one_class_need_two_objects() -> None:
    twin = replace(CIRCLE, colour="blue", x=44.0, y=44.0)
    asked = scene(CIRCLE, twin)
    assert check_boxes(render(asked)[0], asked.boxes)
    alone = check_boxes(render(scene(CIRCLE))[0], asked.boxes)
    assert not alone and not alone.content_ok and 0.4 < alone.overlap < 0.55
    swapped = check_boxes(render(scene(CIRCLE, SQUARE))[0], asked.boxes)
    assert not swapped and not swapped.content_ok


def test_what_is_no_shape_fails_the_map() -> None:
    """A blot of mixed colours has no label, yet nobody asked for it."""
    asked = scene(CIRCLE)
    image, labels = render(asked)
    blotted = image.copy()
    blotted[40:60:2, 40:60], blotted[41:60:2, 40:60] = (225, 25, 35), (20, 150, 50)
    found = find_objects(blotted)
    assert any(f.shape is None for f in found)
    assert not judge_segmentation(found, labels) and not judge_boxes(found, asked.boxes, asked.size)


def test_overlaps_are_those_of_torchless_arithmetic() -> None:
    """Against counted pixels of integer boxes."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 20, (12, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1) + 1], 1).astype(float)

    def cells(box: np.ndarray) -> set[tuple[int, int]]:
        x0, y0, x1, y1 = box.astype(int)
        return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}

    expected = [[len(cells(a) & cells(b)) / len(cells(a) | cells(b)) for b in boxes] for a in boxes]
    np.testing.assert_allclose(box_overlaps(boxes, boxes), expected)


def test_label_map_of_found_objects_is_nearly_the_true_one() -> None:
    drawn = scene(CIRCLE, SQUARE)
    image, labels = render(drawn)
    assert np.mean(label_map(find_objects(image), (64, 64)) != labels) < 0.01


def test_nothing_asked_and_nothing_drawn() -> None:
    image, labels = render(scene())
    assert check_boxes(image, np.zeros((0, 5))) and check_segmentation(image, labels)
    assert not check_boxes(render(scene(CIRCLE))[0], torch.zeros(0, 5).numpy())
