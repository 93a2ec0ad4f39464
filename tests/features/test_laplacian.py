"""The weight-free perceptual distance: a distance, monotone in distortion, with finite gradients at every size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.features import laplacian
from darkroom.features.laplacian import NormalisedLaplacianDistance


def picture(batch: int = 2, size: tuple[int, int] = (48, 64)) -> Tensor:
    """Smooth colour with edges, in [-1, 1]."""
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(batch, 3, 4, 4, generator=g), size=size, mode="bicubic").clamp(0, 1)
    smooth[:, :, size[0] // 3 : size[0] // 2, size[1] // 4 : size[1] // 2] = 0.9
    return smooth * 2 - 1


def test_identity_and_symmetry() -> None:
    distance = NormalisedLaplacianDistance()
    x, y = picture(), picture().flip(-1)
    assert torch.equal(distance(x, x), torch.zeros(2))
    torch.testing.assert_close(distance(x, y), distance(y, x))
    assert bool((distance(x, y) > 0.05).all())


@pytest.mark.parametrize("kind", ["noise", "blur", "contrast"])
def test_grows_with_distortion(kind: str) -> None:
    x = picture()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def distort(strength: float) -> Tensor:
        if kind == "noise":
            return x + strength * noise
        if kind == "contrast":
            return x * (1 - strength)
        return torch.lerp(x, F.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False), strength)

    values = torch.stack([NormalisedLaplacianDistance()(x, distort(s)) for s in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)])
    assert bool((values.diff(dim=0) > 0).all()), values


def test_errors_count_less_where_the_image_is_busy() -> None:
    g = torch.Generator().manual_seed(0)
    flat = torch.zeros(1, 1, 64, 64)
    busy = torch.rand(1, 1, 64, 64, generator=g) * 2 - 1
    noise = 0.1 * torch.randn(1, 1, 64, 64, generator=g)
    distance = NormalisedLaplacianDistance()
    assert float(distance(flat, flat + noise)) > 1.5 * float(distance(busy, busy + noise))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (7, 5), (16, 16), (33, 64)])
def test_small_and_odd_images(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = x.flip(0).requires_grad_()
    value = NormalisedLaplacianDistance()(x, y)
    value.sum().backward()
    assert value.shape == (2,) and bool((value > 0).all())
    assert y.grad is not None and bool(y.grad.isfinite().all())


def test_gradient_at_equal_images_and_in_float64() -> None:
    x = picture(1, (16, 16))
    y = x.clone().requires_grad_()
    NormalisedLaplacianDistance()(x, y).sum().backward()
    assert y.grad is not None and bool(y.grad.isfinite().all())
    small = torch.rand(1, 1, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(NormalisedLaplacianDistance(3), (small, small.flip(-1).clone().requires_grad_()))


@pytest.mark.parametrize("size", [5, 8, 9, 16])
def test_filters_are_the_convolutions_they_stand_for(size: int) -> None:
    x = torch.rand(3, size, size + 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = torch.tensor(laplacian.FILTER, dtype=torch.float64)
    kernel = torch.outer(row, row).view(1, 1, 5, 5)

    def convolve(t: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(F.pad(t.unsqueeze(1), (2, 2, 2, 2), mode="reflect"), kernel, stride=stride).squeeze(1)

    low = laplacian._apply(laplacian._reduce_matrix, x)
    torch.testing.assert_close(laplacian._apply(laplacian._blur_matrix, x), convolve(x))
    torch.testing.assert_close(low, convolve(x, 2))
    zeros = torch.zeros_like(x)
    zeros[:, ::2, ::2] = low
    torch.testing.assert_close(laplacian.expand(low, *x.shape[-2:]), 4 * convolve(zeros))


def test_the_pyramid_is_complete() -> None:
    """Adding the bands up again gives the image: nothing is lost before the normalisation."""
    x = torch.rand(3, 21, 34, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    *fine, total = laplacian.laplacian_pyramid(x, 4)
    for band in reversed(fine):
        total = band + laplacian.expand(total, *band.shape[-2:])
    torch.testing.assert_close(total, x)


def test_autocast_does_not_lower_its_precision() -> None:
    x, y = picture(), picture().flip(-1)
    with torch.autocast("cpu", torch.bfloat16):
        value = NormalisedLaplacianDistance()(x, y)
    assert torch.equal(value, NormalisedLaplacianDistance()(x, y))
