"""The procedural set says only what is true, repeats itself, and keeps its held-out combinations out of training."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from darkroom.data import shapes
from darkroom.data.shape_rendering import coverage
from darkroom.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Caption,
    CaptionObject,
    draw_scene,
    held_out,
    parse_caption,
    prompts,
    render,
)
from darkroom.errors import DarkroomError


@pytest.fixture(scope="module")
def scenes() -> list[shapes.Scene]:
    return [draw_scene(i, seed=3) for i in range(1500)]


def test_a_scene_depends_on_seed_split_and_index_only() -> None:
    one, again = draw_scene(7, seed=1), draw_scene(7, seed=1)
    assert one == again
    assert np.array_equal(render(one)[0], render(again)[0])
    others = [draw_scene(8, seed=1), draw_scene(7, seed=2), draw_scene(7, seed=1, split="validation")]
    assert all(one != other for other in others)


def test_pictures_of_version_1_have_not_changed() -> None:
    """Recorded facts: a change here must raise VERSION, or caches and reported numbers go stale unnoticed."""
    assert shapes.VERSION == 1
    assert [draw_scene(i).caption for i in range(3)] == [
        "an orange cross at the bottom",
        "a green ring to the right of a purple circle",
        "a red square in the center",
    ]
    assert int(render(draw_scene(1))[0].astype(np.int64).sum()) == 126710


def test_captions_are_true(scenes: list[shapes.Scene]) -> None:
    for scene in scenes:
        words = scene.caption.split()
        first = scene.objects[0]
        assert (words[1], words[2]) == (first.colour, first.shape)
        x, y = first.x / 64, first.y / 64
        if "of a" in scene.caption or " above " in scene.caption or " below " in scene.caption:
            second = scene.objects[1]
            assert words[-2:] == [second.colour, second.shape] and first.colour != second.colour
            dx, dy = second.x - first.x, second.y - first.y
            along = {"left": dx, "right": -dx, "above": dy, "below": -dy}[words[5] if words[3] == "to" else words[3]]
            across = dy if words[3] == "to" else dx
            assert along >= 22 and abs(across) <= 8
            assert along - first.radius - second.radius >= 3
        elif "left" in words:
            assert x < 1 / 3 - 1.4 / 64
        elif "right" in words:
            assert x > 2 / 3 + 1.4 / 64
        elif "top" in words:
            assert y < 1 / 3 - 1.4 / 64
        elif "bottom" in words:
            assert y > 2 / 3 + 1.4 / 64
        elif "center" in words:
            assert 1 / 3 < x < 2 / 3 and 1 / 3 < y < 2 / 3
    kinds = {parse_caption(s.caption).position for s in scenes} | {parse_caption(s.caption).relation for s in scenes}
    assert len(kinds) == 1 + 5 + 4


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (96, 64), (128, 200)])
def test_boxes_and_label_map_fit_the_picture(size: tuple[int, int]) -> None:
    unit = min(size) / 64
    for index in range(60):
        scene = draw_scene(index, seed=5, size=size)
        image, labels = render(scene)
        assert image.shape == (size[1], size[0], 3) and labels.shape == (size[1], size[0])
        assert scene.class_label == SHAPES.index(scene.objects[0].shape)
        assert np.array_equal(image[labels == 0][0], BACKGROUNDS[scene.background])
        for item, box in zip(scene.objects, scene.boxes, strict=True):
            x0, y0, x1, y1 = box[1:] * [size[0], size[1], size[0], size[1]]
            assert 0 < x0 < x1 < size[0] and 0 < y0 < y1 < size[1]
            assert 16 * unit - 1e-3 <= x1 - x0 <= 30 * unit + 1e-3
            own = (labels == SHAPES.index(item.shape) + 1) & (
                np.abs(image - np.array(COLOURS[item.colour])).sum(-1) == 0
            )
            ys, xs = np.nonzero(own)
            # Corners and tips of one or two pixels are partly covered, so not pure.
            assert abs(xs.min() - x0) < 4 and abs(xs.max() + 1 - x1) < 4
            assert abs(ys.min() - y0) < 4 and abs(ys.max() + 1 - y1) < 4


def test_coverage_has_the_area_of_the_shape() -> None:
    for shape in SHAPES:
        covered = coverage(shape, 30.3, 33.8, 13.7, (64, 64))
        assert covered.sum() == pytest.approx(shapes_area(shape) * 13.7**2, rel=0.02)


def shapes_area(shape: str) -> float:
    """Areas in half-sizes, by elementary geometry."""
    return {
        "circle": np.pi,
        "square": 4,
        "triangle": 2,
        "diamond": 2,
        "cross": 2 * (2 * 0.72) - 0.72**2,
        "ring": np.pi * 0.75,
    }[shape]


def test_colours_are_well_apart() -> None:
    palette = [np.array(c) for c in COLOURS.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(palette, 2)) >= 97
    assert min(np.linalg.norm(a - np.array(b)) for a in palette for b in BACKGROUNDS.values()) >= 97


def test_held_out_rule() -> None:
    objects = [CaptionObject(c, s) for c in COLOURS for s in SHAPES]
    out = [o for o in objects if Caption((o,)).held_out]
    assert len(out) == 6 and {o.shape for o in out} == set(SHAPES)
    kept = {(o.colour, o.shape) for o in objects if o not in out}
    assert {c for c, _ in kept} == set(COLOURS) and {s for _, s in kept} == set(SHAPES)

    def clean(shape: str, but: str = "") -> CaptionObject:
        return next(o for o in objects if o.shape == shape and o not in out and o.colour != but)

    count = 0
    for one, other in itertools.product(SHAPES, SHAPES):
        first = clean(one)
        second = clean(other, but=first.colour)
        for relation in RELATIONS:
            this = Caption((first, second), relation=relation)
            swapped = Caption((second, first), relation=shapes.OPPOSITE[relation])
            assert this.held_out == swapped.held_out == held_out(str(this))
            count += this.held_out
    assert count == 2 * 11


def test_training_never_shows_a_held_out_combination(scenes: list[shapes.Scene]) -> None:
    assert not any(held_out(s.caption) for s in scenes)
    assert not any(held_out(draw_scene(i, split="validation").caption) for i in range(300))
    assert any(held_out(draw_scene(i, split="all").caption) for i in range(100))


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_prompts(kind: str) -> None:
    assert prompts(50, 4, kind) == prompts(50, 4, kind) != prompts(50, 5, kind)
    assert prompts(100, 4, kind)[:50] == prompts(50, 4, kind)
    assert {parse_caption(p).kind for p in prompts(50, 0, kind)} == {kind}
    assert {held_out(p) for p in prompts(200, 0, kind)} == {True, False}
    assert {held_out(p) for p in prompts(50, 0, kind, held_out=True)} == {True}
    assert {held_out(p) for p in prompts(50, 0, kind, held_out=False)} == {False}
    with pytest.raises(DarkroomError, match="triple"):
        prompts(1, 0, "triple")


def test_parsing_is_the_inverse_of_writing() -> None:
    for text in prompts(100, 0, "single") + prompts(100, 0, "pair"):
        assert str(parse_caption(text)) == text
    assert str(parse_caption("An  orange circle At the top.")) == "an orange circle at the top"
    with pytest.raises(DarkroomError, match="a red fox"):
        parse_caption("a red fox")


def test_too_small_pictures_are_refused() -> None:
    with pytest.raises(DarkroomError, match="32x32"):
        draw_scene(0, size=(24, 64))
