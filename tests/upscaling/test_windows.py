"""Windows of a canvas: their shares, and that what is denoised by them is the mean of what they say."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from condition_models import make_model
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.diffusion.noise import SeededNoise
from darkroom.errors import DarkroomError
from darkroom.generation_request import Request
from darkroom.guidance import Guide, Guided
from darkroom.upscaling.windows import Window, WindowedDenoise, make_windows, seen, shares


@pytest.mark.parametrize(
    ("height", "width", "side", "overlap", "multiple"),
    [
        (64, 96, 32, 8, 4),
        (12, 100, 16, 8, 4),
        (40, 40, 40, 0, 1),
        (7, 9, 4, 2, 1),
        (64, 64, 16, 0, 2),
        (16, 16, 4, 0, 4),
    ],
)
def test_shares_sum_to_one_and_fade_out(height: int, width: int, side: int, overlap: int, multiple: int) -> None:
    windows = make_windows(height, width, side, overlap, multiple)
    total = torch.zeros(height, width, dtype=torch.float64)
    for window in windows:
        assert window.rows[0] % multiple == window.columns[0] % multiple == 0
        assert window.weight.shape == (window.rows[1] - window.rows[0], window.columns[1] - window.columns[0])
        window.of(total).add_(window.weight)
        if overlap and window.columns[0] > 0:
            assert float(window.weight[:, 0].max()) < 0.2
    assert float((total - 1).abs().max()) < 1e-12
    starts = sorted({w.columns for w in windows})
    assert all(a[1] - b[0] >= overlap for a, b in pairwise(starts))
    assert starts[0][0] == 0 and starts[-1][1] == width


def test_two_shares_are_the_halves_of_a_circle() -> None:
    left, right = shares([(0, 6), (2, 8)])
    places = (torch.arange(2, 6, dtype=torch.float64) + 0.5 - 2) / 4
    torch.testing.assert_close(right[:4], torch.sin(torch.pi / 2 * places) ** 2)
    torch.testing.assert_close(left[2:], torch.cos(torch.pi / 2 * places) ** 2)
    assert left[:2].tolist() == right[4:].tolist() == [1, 1]


def test_windows_that_do_not_fit_are_refused() -> None:
    for side, overlap, multiple in ((10, 2, 4), (0, 0, 1), (8, 5, 1), (4, 1, 4)):
        with pytest.raises(DarkroomError, match="windows of"):
            make_windows(16, 16, side, overlap, multiple)
    assert len(make_windows(8, 8, 8, 4, 8)) == 1  # no neighbour to share anything with


def test_windows_see_their_part_of_maps_and_all_of_the_rest() -> None:
    windows = make_windows(8, 8, 4, 0)
    maps = torch.arange(64.0).view(1, 1, 8, 8)
    one = Conditioning(context=torch.rand(1, 3, 5), concat=maps, label=torch.tensor([4]))
    many = seen(one, windows)
    assert many.concat is not None and many.context is not None and many.label is not None
    assert torch.equal(many.concat[3], maps[0, :, 4:, 4:]) and many.context.shape == (4, 3, 5)
    assert many.label.tolist() == [4] * 4
    assert seen(Conditioning(label=torch.tensor([1])), windows).concat is None


class Plain:
    """A stand-in for `Guided`: a pointwise rule, whose answer does not depend on the window."""

    nfe = 0

    def mapped(self, _: Any) -> Plain:
        return Plain()

    def __call__(self, x: Tensor, level: Any) -> Tensor:
        self.nfe += 1
        return x**2 + 1


def test_a_pointwise_denoiser_is_the_same_by_windows() -> None:
    x = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    told: list[int] = []
    denoise = WindowedDenoise(Plain(), make_windows(24, 40, 16, 4), 3, told.append)  # type: ignore[arg-type]
    torch.testing.assert_close(denoise(x, None), x**2 + 1)  # type: ignore[arg-type]
    assert denoise.nfe == 1 and told == [3, 6] and len(denoise.windows) == 6


@pytest.fixture(scope="module")
def bound() -> Any:
    return make_bound(torch.float32)


@pytest.fixture(scope="module")
def exactly_bound() -> Any:
    return make_bound(torch.float64)


def make_bound(dtype: torch.dtype) -> tuple[Any, Any, list[Window], Tensor]:
    """A network whose windows disagree: (model, guided on a canvas of 24x32 latent places, windows, noise)."""
    model = make_model("low_resolution", low_resolution={"noise_levels": 0, "drop_rate": 0.1})
    model.denoiser.to(dtype)
    picture = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    request = model.validate(Request(size=(64, 48), conditions={"low_resolution": picture}, guidance_scale=2.0))
    noise = SeededNoise([5], (model.latent_channels, 24, 32))(0).to(dtype)
    return model, model.guided(request, slice(0, 1)), make_windows(24, 32, 16, 8, 2), noise


@torch.no_grad()
def test_the_order_makes_no_difference(bound: Any) -> None:
    model, guided, windows, x = bound
    level = model.grid("ddim", 4)[1]
    first = WindowedDenoise(guided, windows, 1)(x, level)
    other = list(windows)
    for seed in range(3):
        random.Random(seed).shuffle(other)
        assert torch.equal(first, WindowedDenoise(guided, other, 1)(x, level))
    assert not torch.allclose(first, guided(x, level), atol=1e-3)  # the windows do disagree


@torch.no_grad()
def test_the_number_at_a_time_makes_no_difference(exactly_bound: Any) -> None:
    model, guided, windows, x = exactly_bound
    level = model.grid("ddim", 4)[1]
    first, other = (WindowedDenoise(guided, windows, count)(x, level) for count in (1, 4))
    torch.testing.assert_close(first, other, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_windows_are_the_weighted_mean_of_separate_pictures(exactly_bound: Any) -> None:
    model, guided, windows, x = exactly_bound
    level = model.grid("ddim", 4)[2]
    total = torch.zeros_like(x, dtype=torch.float64)
    for w in windows:
        cut = guided.mapped(lambda c, w=w: Conditioning(concat=w.of(c.concat)))
        w.of(total[0]).add_(cut(w.of(x), level)[0].double() * w.weight)
    torch.testing.assert_close(WindowedDenoise(guided, windows, 2)(x, level), total, atol=1e-12, rtol=1e-12)


def test_guides_have_no_windows(bound: Any) -> None:
    model, *_ = bound
    guided = Guided(model.denoiser, None, guide=Guide(model.denoiser))
    with pytest.raises(DarkroomError, match="works on whole images"):
        guided.mapped(lambda c: c)
