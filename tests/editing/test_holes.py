"""Holes and windows: every pixel of a mask is repainted once, in a window that shows what is near."""

from __future__ import annotations

import numpy as np
import pytest

from darkroom.editing.holes import around, box_of, cut, holes_of, windows_of

SIDE, LARGEST = 32, 64


def disc(shape: tuple[int, int], row: float, column: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def random_mask(seed: int, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    for _ in range(int(rng.integers(1, 6))):
        radius = rng.choice([1, 3, 8, 20])
        mask |= disc(shape, rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), radius)
    return mask


def border(shape: tuple[int, int], width: int) -> np.ndarray:
    mask = np.ones(shape, bool)
    mask[width:-width, width:-width] = False
    return mask


MASKS = {
    "speck": disc((90, 120), 5, 7, 0),
    "two far away": disc((90, 300), 20, 20, 5) | disc((90, 300), 60, 280, 9),
    "large": disc((200, 200), 100, 90, 60),
    "border": border((150, 260), 14),
    "wide border": border((150, 260), 60),
    "tiny picture": disc((3, 5), 1, 1, 1),
    **{f"random {k}": random_mask(k, (130, 170)) for k in range(8)},
}


@pytest.mark.parametrize("name", MASKS)
def test_every_pixel_is_repainted_once(name: str) -> None:
    mask = MASKS[name]
    height, width = mask.shape
    times = np.zeros(mask.shape, int)
    for window in windows_of(mask, SIDE, LARGEST):
        left, top, right, bottom = window.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        own = window.own(mask)
        assert own.any() and not (own & ~cut(mask, window.box)).any()
        times[top:bottom, left:right] += own
    assert np.array_equal(times, mask.astype(int))


def test_a_window_has_the_size_of_training_or_twice_the_hole() -> None:
    (window,) = windows_of(MASKS["speck"], SIDE, LARGEST)
    assert window.box == (0, 0, 32, 32)  # moved into the picture
    (window,) = windows_of(disc((200, 200), 100, 90, 12), SIDE, LARGEST)
    assert window.box == (65, 75, 115, 125)  # 25 pixels, 50 around them
    (window,) = windows_of(MASKS["large"], SIDE, LARGEST)
    assert window.box[2] - window.box[0] == 200  # to be made smaller


def test_long_and_thin_is_repainted_in_parts() -> None:
    thin = windows_of(MASKS["border"], SIDE, LARGEST)
    assert len(thin) > 8 and all(w.box[2] - w.box[0] == w.box[3] - w.box[1] == LARGEST for w in thin)
    assert all((~cut(MASKS["border"], w.box)).mean() >= 0.4 for w in thin)
    wide = windows_of(MASKS["wide border"], SIDE, LARGEST)
    assert len(wide) == 1 and wide[0].box == (0, 0, 260, 150)


def test_specks_in_one_window_are_repainted_together() -> None:
    specks = np.zeros((40, 300), bool)
    specks[5, ::15] = True
    assert len(windows_of(specks, SIDE, LARGEST)) < 0.6 * len(holes_of(specks, 8))


def test_holes_are_the_connected_parts() -> None:
    holes = holes_of(MASKS["two far away"], 8)
    assert [hole.box for hole in holes] == [(15, 15, 26, 26), (271, 51, 290, 70)]
    rings = disc((64, 64), 32, 32, 30) & ~disc((64, 64), 32, 32, 20)
    assert len(holes_of(rings, 4)) == 1 and box_of(rings) == (2, 2, 63, 63)


def test_around_stays_inside() -> None:
    assert around((10, 10, 20, 20), 8, (50, 50)) == (11, 11, 19, 19)
    assert around((45, 0, 50, 3), 20, (50, 50)) == (30, 0, 50, 20)
    assert around((1, 1, 2, 2), 20, (10, 12)) == (0, 0, 12, 10)
