"""The flat-colour test finds the energy and the wave that a decoder adds, and nothing where there is nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from darkroom.first_stage.artefacts import AMPLIFIED, RGB, STEP, flat_colour_test, flat_colours, strongest_wave
from darkroom.first_stage.posterior import Posterior


class Made:
    """The identity with f = 4 and a wave on top; `wave` is (S, S) of any power."""

    def __init__(self, channels: int = 3, offset: float = 0.0) -> None:
        self.image_channels, self.downsampling, self.offset = channels, 4, offset

    def wave(self, size: int) -> Tensor:
        return torch.zeros(size, size)

    def encode(self, image: Tensor) -> Posterior:
        return Posterior(image[..., ::4, ::4])

    def decode(self, latent: Tensor) -> Tensor:
        image = latent.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return image + self.offset + self.wave(image.shape[-1])


class Checkerboard(Made):
    amplitude = 3 * STEP

    def wave(self, size: int) -> Tensor:
        place = torch.arange(size)
        return self.amplitude * (1 - 2.0 * ((place[:, None] + place[None]) % 2))


class Columns(Made):
    def wave(self, size: int) -> Tensor:  # the latent's grid: one wave in f pixels
        return (0.1 * torch.cos(2 * math.pi * torch.arange(size) / 4)).expand(size, size)


class Frame(Made):
    def wave(self, size: int) -> Tensor:
        wave = torch.zeros(size, size)
        wave[0] = wave[-1] = 1.0
        return wave


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_a_perfect_first_stage(channels: int) -> None:
    found = flat_colour_test(Made(channels))
    assert found.ripple == 0 and found.colour_error < 1e-4 and found.worst.pattern == "none"
    assert found.picture.shape == (len(flat_colours(channels)), channels, 128, 64)
    assert all(c.decibels <= -200 for c in found.colours)


def test_a_checkerboard_of_known_energy() -> None:
    found = flat_colour_test(Checkerboard())
    assert [c.name for c in found.colours] == list(RGB)
    for colour in found.colours:
        assert colour.ripple == pytest.approx(3.0, rel=1e-5) and colour.interior == pytest.approx(3.0, rel=1e-5)
        assert colour.decibels == pytest.approx(20 * math.log10(3 / 255), abs=1e-4)
        assert colour.frequency == (0.5, 0.5) and colour.period == 2.0 and colour.share == pytest.approx(1.0)
        assert colour.colour_error < 1e-4
    assert found.worst.pattern == "checkerboard, period 2 px, 100 % of the power"
    ripple = found.picture[1, :, 64:]  # of grey: amplified and not cut off
    assert float(ripple.max()) == pytest.approx(AMPLIFIED * 3 * STEP, rel=1e-4)


def test_the_latents_grid_is_named_by_its_period() -> None:
    found = flat_colour_test(Columns(), size=50)
    assert found.size == 48  # a multiple of f
    assert found.worst.frequency == (0.0, 0.25) and found.worst.pattern.startswith("columns, period 4 px")
    assert found.ripple == pytest.approx(0.1 / math.sqrt(2) / STEP, rel=1e-5)


def test_what_the_border_does_is_told_apart() -> None:
    found = flat_colour_test(Frame())
    assert found.worst.interior == pytest.approx(0.0, abs=1e-6) and found.ripple > 10


def test_a_wrong_colour_is_no_ripple() -> None:
    found = flat_colour_test(Made(offset=5 * STEP))
    grey = next(c for c in found.colours if c.name == "grey")
    assert grey.colour_error == pytest.approx(5.0, rel=1e-4) and found.ripple < 1e-4
    white = next(c for c in found.colours if c.name == "white")
    assert white.colour_error == 0  # what is beyond the range is cut off in a file
    assert found.as_dict()["colours"][1]["name"] == "grey" and len(str(found.as_dict())) < 6000


def test_the_strongest_wave_of_a_mixture() -> None:
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(24.0), indexing="ij")
    one = torch.sin(2 * math.pi * (3 * y / 32 - 2 * x / 24))
    two = 0.5 * torch.sin(2 * math.pi * 8 * x / 24)
    frequency, share = strongest_wave(torch.stack([one + two, torch.zeros(32, 24)]))
    assert frequency == (3 / 32, 2 / 24) and share == pytest.approx(1 / 1.25)
    assert strongest_wave(torch.zeros(1, 8, 8)) == ((0.0, 0.0), 0.0)
