"""Random masks: what each kind looks like, and that shares are evenly spread over what the rule allows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from darkroom.data.masks import KINDS, RandomMask, draw_mask
from darkroom.errors import DarkroomError


def only(kind: str, share: tuple[float, float] = (0.05, 0.5)) -> RandomMask:
    return RandomMask(share, **{name: float(name == kind) for name in KINDS})


def drawn(rule: RandomMask, count: int = 60, size: tuple[int, int] = (64, 64)) -> list[np.ndarray]:
    return [draw_mask(np.random.default_rng([7, seed]), size, rule)[0] for seed in range(count)]


def thickness(mask: np.ndarray) -> float:
    """The mean over masked pixels of their distance to the nearest kept pixel."""
    outside = np.pad(mask, 1)
    return float(np.mean(ndimage.distance_transform_edt(outside)[1:-1, 1:-1][mask > 0]))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("share", [(0.05, 0.5), (0.4, 0.5), (0.8, 1.0)])
def test_every_kind_keeps_the_share(kind: str, share: tuple[float, float]) -> None:
    for size in ((40, 40), (60, 25)):
        masks = drawn(only(kind, share), 8, size)
        assert all(m.shape == (size[1], size[0]) and set(np.unique(m)) <= {0.0, 1.0} for m in masks)
        shares = np.array([m.mean() for m in masks])
        assert shares.min() >= share[0] and shares.max() <= share[1]


@pytest.mark.parametrize("kind", list(KINDS))
def test_shares_are_spread_evenly(kind: str) -> None:
    """The share is drawn first: a quarter of the masks lies in each quarter, but for what one shape overshoots."""
    shares = np.array([m.mean() for m in drawn(only(kind), 200, (40, 40))])
    counts = np.histogram(shares, bins=4, range=(0.05, 0.5))[0]
    assert counts.min() >= 8 and counts.max() <= 90


def test_strokes_differ_in_thickness() -> None:
    thin, medium, thick = (np.mean([thickness(m) for m in drawn(only(k))]) for k in ("thin", "medium", "thick"))
    assert thin < 1.8 and 1.5 * thin < medium and 1.5 * medium < thick


def test_boxes_have_straight_sides() -> None:
    for mask in drawn(only("boxes", (0.05, 0.1)), 20):
        labels, count = ndimage.label(mask)
        if count == 1:
            rows, columns = ndimage.find_objects(labels)[0]
            assert mask[rows, columns].mean() > 0.5
    one = [m for m in drawn(only("boxes", (0.02, 0.9)), 100) if m.mean() < 0.1]
    assert one and all(m[m.any(1)][:, m.any(0)].all() for m in one[:3])


def test_borders_keep_one_rectangle() -> None:
    seen = set()
    for mask in drawn(only("borders"), 80):
        kept = mask == 0
        assert kept[kept.any(1)][:, kept.any(0)].all()
        sides = (mask[:, 0].all(), mask[0].all(), mask[:, -1].all(), mask[-1].all())
        assert any(sides)
        seen.add(sides)
    assert len(seen) > 6


def test_the_kinds_are_as_frequent_as_asked() -> None:
    rule = RandomMask((0.2, 0.4), thin=0, medium=0, thick=0, boxes=1, borders=3)
    kept = [mask == 0 for mask in drawn(rule, 200)]
    borders = sum(k[k.any(1)][:, k.any(0)].all() for k in kept)
    assert 120 < borders < 180


def test_a_mask_is_a_function_of_its_seed() -> None:
    rule = RandomMask(borders=1)
    for seed in range(10):
        one, two = (draw_mask(np.random.default_rng(seed), (48, 32), rule) for _ in range(2))
        assert np.array_equal(one, two)
    assert len({m.tobytes() for m in drawn(rule)}) == 60


@pytest.mark.parametrize("odds", [{"thin": -1.0}, dict.fromkeys(KINDS, 0.0)])
def test_odds_that_cannot_be_are_refused(odds: dict[str, float]) -> None:
    with pytest.raises(DarkroomError, match=r"data\.repaint_mask: thin .* give numbers from 0 on, not all of them 0"):
        RandomMask(**odds)  # type: ignore[arg-type]


def test_tiny_pictures_have_masks() -> None:
    for kind in KINDS:
        for mask in drawn(only(kind, (0.1, 0.5)), 10, (4, 4)):
            assert 0.1 <= mask.mean() <= 0.5
