"""The checker is right on real images, on degraded ones, and never accepts an altered caption."""

from __future__ import annotations

import time

import numpy as np
import pytest

from darkroom.data.shape_checker import _components
from darkroom.data.shapes import (
    COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    Caption,
    CaptionObject,
    Scene,
    check_caption,
    draw_scene,
    find_objects,
    judge,
    parse_caption,
    render,
)

COUNT = 2000
DEGRADED = 400


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur of 1 pixel and Gaussian noise of 6/255."""
    taps = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    taps /= taps.sum()
    soft = np.pad(image.astype(np.float64), ((4, 4), (4, 4), (0, 0)), mode="edge")
    soft = sum(t * soft[i : i + image.shape[0]] for i, t in enumerate(taps))
    soft = sum(t * soft[:, i : i + image.shape[1]] for i, t in enumerate(taps))
    return np.clip(np.rint(soft + rng.normal(0, 6, image.shape)), 0, 255).astype(np.uint8)


def altered(scene: Scene) -> list[Caption]:
    """Every false caption that differs from the true one in one colour, one shape, the position or the relation."""
    true = parse_caption(scene.caption)
    out: list[Caption] = []
    for place, named in enumerate(true.objects):
        for other in [CaptionObject(c, named.shape) for c in COLOURS] + [
            CaptionObject(named.colour, s) for s in SHAPES
        ]:
            objects = list(true.objects)
            objects[place] = other
            if other != named and len({o.colour for o in objects}) == len(objects):
                out.append(Caption(tuple(objects), true.position, true.relation))
    if true.relation is not None:
        out += [Caption(true.objects, relation=r) for r in RELATIONS if r != true.relation]
        out.append(Caption(true.objects[::-1], relation=true.relation))
        out.append(Caption(true.objects[:1]))
        a, b = true.objects
        if a.shape != b.shape:
            swapped = (CaptionObject(a.colour, b.shape), CaptionObject(b.colour, a.shape))
            out.append(Caption(swapped, relation=true.relation))
    else:
        third = scene.size[0] / 3
        x, y = scene.objects[0].x / third, scene.objects[0].y / third
        holds = (x < 1, x > 2, y < 1, y > 2, 1 <= x <= 2 and 1 <= y <= 2)
        out += [Caption(true.objects, position=p) for p, h in zip(POSITIONS, holds, strict=True) if not h]
    return out


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(i, seed=11, split="all") for i in range(COUNT)]


def test_real_images_pass_and_altered_captions_fail(scenes: list[Scene]) -> None:
    right = accepted = asked = 0
    for scene in scenes:
        found = find_objects(render(scene)[0])
        right += judge(found, scene.caption, scene.size).ok
        if found and len(scene.caption) % 4 == 0:
            verdicts = [judge(found, c, scene.size).ok for c in altered(scene)]
            accepted += sum(verdicts)
            asked += len(verdicts)
    assert right / COUNT >= 0.995
    assert asked > 4000 and accepted == 0


def test_blurred_and_noisy_images_too(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    right = accepted = 0
    for scene in scenes[:DEGRADED]:
        found = find_objects(degrade(render(scene)[0], rng))
        right += judge(found, scene.caption, scene.size).ok
        accepted += sum(judge(found, c, scene.size).ok for c in altered(scene))
    assert right / DEGRADED >= 0.995
    assert accepted == 0


@pytest.mark.parametrize("size", [(40, 40), (128, 128), (96, 64), (64, 112)])
def test_other_sizes(size: tuple[int, int]) -> None:
    scenes = [draw_scene(i, seed=2, split="all", size=size) for i in range(60)]
    assert all(check_caption(render(s)[0], s.caption) for s in scenes)


def test_places_are_found_to_the_pixel(scenes: list[Scene]) -> None:
    for scene in scenes[:200]:
        result = check_caption(render(scene)[0], scene.caption)
        for item in scene.objects:
            near = next(f for f in result.found if (f.colour, f.shape) == (item.colour, item.shape))
            assert abs(near.x - item.x) < 0.5 and abs(near.y - item.y) < 0.5 and abs(near.radius - item.radius) < 0.5


def test_parts_of_the_verdict() -> None:
    scene = next(s for s in map(draw_scene, range(100)) if s.caption == "a red square in the center")
    image = render(scene)[0]
    verdicts = {
        "a red square in the center": (True, True, True, True),
        "a blue square in the center": (False, False, True, False),
        "a red circle in the center": (False, True, False, False),
        "a red square on the left": (False, True, True, False),
    }
    for caption, expected in verdicts.items():
        result = check_caption(image, caption)
        assert (result.ok, result.colour_ok, result.shape_ok, result.position_ok) == expected
        assert bool(result) == result.ok and result.count_ok
    assert not check_caption(image, "a red square above a blue ring").count_ok


def test_things_that_are_not_objects_of_the_set() -> None:
    rng = np.random.default_rng(0)
    empty = np.full((64, 64, 3), 200, np.uint8)
    assert find_objects(empty) == ()
    assert not check_caption(empty, "a red circle")
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not any(check_caption(noise, f"a {c} {s}") for c in ("red", "blue") for s in SHAPES)
    brick = empty.copy()
    brick[20:32, 8:56] = COLOURS["red"]
    assert [f.shape for f in find_objects(brick)] == [None]
    grey = empty.copy()
    grey[20:40, 20:40] = 90
    assert [f.colour for f in find_objects(grey)] == [None]
    # A third object makes a true caption false.
    scene = next(s for s in map(draw_scene, range(100)) if s.caption == "a red square in the center")
    image = render(scene)[0]
    image[1:11, 1:11] = COLOURS["green"]
    assert not check_caption(image, scene.caption)


def test_touching_objects_come_apart() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[22:42, 10:30] = COLOURS["blue"]
    image[22:42, 30:50] = COLOURS["yellow"]
    assert check_caption(image, "a blue square to the left of a yellow square")
    assert not check_caption(image, "a yellow square to the left of a blue square")


def test_components_against_flood_fill() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((17, 23)) < 0.4
        labels, areas = _components(mask)
        assert np.array_equal(labels > 0, mask)
        seen = np.zeros_like(mask)
        count = 0
        for start in zip(*np.nonzero(mask), strict=True):
            if seen[start]:
                continue
            count += 1
            stack, region = [start], []
            seen[start] = True
            while stack:
                y, x = stack.pop()
                region.append(labels[y, x])
                for v in range(max(y - 1, 0), min(y + 2, 17)):
                    for u in range(max(x - 1, 0), min(x + 2, 23)):
                        if mask[v, u] and not seen[v, u]:
                            seen[v, u] = True
                            stack.append((v, u))
            assert len(set(region)) == 1 and areas[region[0] - 1] == len(region)
        assert count == len(areas)


def test_speed() -> None:
    image = render(draw_scene(1))[0]
    find_objects(image)
    best = min(_seconds(image) for _ in range(20))
    assert best < 0.01


def _seconds(image: np.ndarray) -> float:
    start = time.thread_time()  # not the clock on the wall: other processes may be busy
    find_objects(image)
    return time.thread_time() - start
