"""Local textures: closed forms, and what a mean square error cannot tell."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.features.texture import EPSILON, STEPS, TextureDistance, variogram

distance = TextureDistance()


def grain(seed: int, size: int = 64) -> Tensor:
    return 0.2 * torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(seed)).expand(1, 3, size, size)


def test_it_is_blind_to_where_the_grain_lies_and_sees_that_it_is_missing() -> None:
    """Another draw of the same grain is nearer than no grain; a mean square error says the opposite."""
    flat = torch.zeros(1, 3, 64, 64)
    assert float(distance(grain(0), grain(1))) < 0.1 * float(distance(grain(0), flat))
    assert F.mse_loss(grain(0), grain(1)) > 1.9 * F.mse_loss(grain(0), flat)


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_repeated_pattern_is_no_grain(period: int) -> None:
    """Of the same variance, and as rough at short steps: the steps of its own period tell it from grain."""
    tile = grain(2)[..., :period, :period]
    tile = (tile - tile.mean()) / tile.std(correction=0) * 0.2
    lattice = tile.repeat(1, 1, 64 // period, 64 // period)
    assert float(distance(grain(0), lattice)) > 3.0 * float(distance(grain(0), grain(1)))


def test_a_wave_in_closed_form() -> None:
    """(sin(w x + w d) - sin(w x))^2 has the mean 1 - cos(w d); the window removes its ripple, of frequency pi."""
    wave = torch.sin(torch.arange(64, dtype=torch.float64) * math.pi / 2).expand(1, 1, 64, 64)
    for amplitude in (0.3, 0.8):
        for down, right in STEPS:
            inside = variogram(amplitude * wave, down, right)[..., 4:10]  # the mirrored edges aside
            expected = amplitude**2 * (1 - math.cos(right * math.pi / 2))
            torch.testing.assert_close(inside, torch.full_like(inside, expected))


def test_steps_to_the_left_are_mirror_images() -> None:
    x = torch.rand(1, 2, 34, 34, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(variogram(x.flip(-1), 1, -1).flip(-1), variogram(x, 1, 1))


def test_brightness_and_colour() -> None:
    """Grey in three channels is the same as in one; grain of colour alone counts, and less than that of brightness."""
    one, other = grain(0), 0.5 * grain(0)
    torch.testing.assert_close(distance(one, other), distance(one[:, :1], other[:, :1]))
    coloured = one * torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    flat = torch.zeros_like(one)
    assert 0.0 < float(distance(coloured, flat)) < float(distance(one, flat))


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 9), (4, 4), (17, 32)])
def test_small_images_and_the_gradient(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(distance(x, x), torch.zeros(2))
    y = x.flip(0).requires_grad_()
    value = distance(x, y)
    value.sum().backward()
    assert value.shape == (2,) and y.grad is not None and bool(y.grad.isfinite().all())
    assert bool((value > 0).all()) == (max(size) >= 2)


def test_precision() -> None:
    x, y = grain(0), grain(1)
    with torch.autocast("cpu", torch.bfloat16):
        value = distance(x, y)
    assert torch.equal(value, distance(x, y))
    assert distance(x.double(), y.double()).dtype == torch.float64


def test_the_distance_of_two_waves_in_closed_form() -> None:
    """Their variograms are even, but for the mirrored edges: (V - V')^2 / 4 V', where both are 0 at whole periods."""
    wave = torch.sin(torch.arange(256, dtype=torch.float64) * math.pi / 2).expand(1, 1, 64, 256)
    for one, other in ((0.3, 0.8), (0.8, 0.3)):
        v = [(1 - math.cos(right * math.pi / 2)) for _, right in STEPS]
        expected = sum((one**2 * x - other**2 * x) ** 2 / (4 * (other**2 * x + EPSILON)) for x in v) / len(STEPS)
        assert float(distance(one * wave, other * wave)) == pytest.approx(expected, rel=0.03)


def test_who_is_unsure_how_rough_a_place_is_paints_the_mean_roughness() -> None:
    """Images of the same grain at three strengths, one reconstruction: the gradients cancel at the mean of V."""
    images = [strength * grain(0) for strength in (0.2, 1.0, 2.0)]
    mean = math.sqrt((0.2**2 + 1.0**2 + 2.0**2) / 3)

    def slope(strength: float) -> float:
        painted = torch.tensor(strength, requires_grad=True)
        sum(distance(image, painted * grain(0)).sum() for image in images).backward()
        assert painted.grad is not None
        return float(painted.grad)

    assert slope(0.97 * mean) < 0 < slope(1.03 * mean)
