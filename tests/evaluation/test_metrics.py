"""Each metric against something independent: a closed form, scikit-image, SciPy, or the whole set at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from darkroom.evaluation.metrics import (
    Moments,
    codes_used,
    frechet_distance,
    gradient_energy,
    gradient_energy_ratio,
    psnr,
    ssim,
)
from darkroom.first_stage.quantizer import perplexity


def pictures(count: int = 3, channels: int = 3, height: int = 37, width: int = 50) -> tuple[Tensor, Tensor]:
    """Smooth random images and noisy copies, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 6, 8, generator=generator) * 2 - 1
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)
    noise = torch.randn(image.shape, generator=generator) * torch.tensor([0.01, 0.1, 0.5])[:count, None, None, None]
    return image, (image + noise).clamp(-1, 1)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_psnr_and_ssim_equal_scikit_image(channels: int) -> None:
    image, other = pictures(channels=channels)
    for i in range(len(image)):
        one, two = image[i].double().numpy(), other[i].double().numpy()
        assert float(psnr(image, other)[i]) == pytest.approx(peak_signal_noise_ratio(one, two, data_range=2), abs=1e-9)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}
        expected = structural_similarity(one, two, data_range=2, **options)
        assert float(ssim(image, other)[i]) == pytest.approx(expected, abs=1e-9)


def test_psnr_and_ssim_of_known_images() -> None:
    grey = torch.zeros(1, 1, 16, 16)
    assert float(psnr(grey, grey + 0.2)) == pytest.approx(20.0, abs=1e-5)  # mse 0.04 of 4
    assert float(psnr(grey, grey)) == pytest.approx(106.0, abs=0.1)
    assert float(ssim(grey, grey)) == 1.0
    checks = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float()[None, None] * 2 - 1
    assert float(ssim(checks, -checks)) < -0.9  # structure turned over
    assert float(ssim(grey[..., :11, :11], grey[..., :11, :11])) == 1.0
    with pytest.raises(ValueError, match="at least 11"):
        ssim(grey[..., :10, :], grey[..., :10, :])
    with pytest.raises(ValueError, match="two batches"):
        psnr(grey, grey[..., 1:])


def test_gradient_energy() -> None:
    ramp = torch.linspace(-1, 1, 21).expand(1, 2, 5, 21)  # 0.1 a step along the rows, none along the columns
    assert float(gradient_energy(ramp)) == pytest.approx(0.01, rel=1e-5)
    image, other = pictures()
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    original = gradient_energy(image)
    assert gradient_energy_ratio(gradient_energy(blurred), original) < 1
    assert gradient_energy_ratio(gradient_energy(other), original) > 1
    assert gradient_energy_ratio(original, original) == 1
    flat = torch.zeros(2)
    assert gradient_energy_ratio(flat, flat) == 1 and math.isinf(gradient_energy_ratio(original[:2], flat))


def gaussian(seed: int, width: int = 12, samples: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x @ torch.diag(torch.linspace(0.1, 3, width, dtype=torch.float64)) + seed
    moments = Moments(width)
    moments.update(x)
    return moments.mean, moments.covariance


def test_frechet_distance_of_gaussians_with_a_closed_form() -> None:
    mean, eye = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    assert frechet_distance(mean, eye, mean, eye) == 0
    # isotropic: |m1 - m2|^2 + D (s1 - s2)^2
    assert frechet_distance(mean, 4 * eye, mean + 3, 0.25 * eye) == pytest.approx(45 + 5 * 1.5**2, rel=1e-12)
    # commuting covariances: sum of (sqrt l1 - sqrt l2)^2 in the common basis
    basis, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    one, two = torch.arange(1, 6, dtype=torch.float64), torch.arange(5, 0, -1, dtype=torch.float64)
    expected = float((one.sqrt() - two.sqrt()).square().sum())
    value = frechet_distance(mean, basis @ one.diag() @ basis.T, mean, basis @ two.diag() @ basis.T)
    assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("samples", [40, 8])  # 8 samples of 12 features: singular covariances
def test_frechet_distance_equals_scipys_matrix_root(samples: int) -> None:
    (m1, s1), (m2, s2) = gaussian(1, samples=samples), gaussian(2, samples=samples)
    root = np.real(sqrtm((s1 @ s2).numpy() + 1e-12 * np.eye(12)))
    expected = float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * float(np.trace(root))
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(frechet_distance(m2, s2, m1, s1), rel=1e-7)
    assert frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_disjoint_sets_is_the_distance_of_their_means() -> None:
    (mean, covariance), far = gaussian(3), torch.full((12,), 1e3, dtype=torch.float64)
    assert frechet_distance(mean, covariance, mean + far, covariance) == pytest.approx(12e6, rel=1e-9)


def test_streamed_moments_equal_those_of_the_whole_set() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(101, 7, generator=generator, dtype=torch.float64) + 1e6  # far from zero: naive sums would lose it
    streamed, left, right = Moments(7), Moments(7), Moments(7)
    for part in x.split(10):
        streamed.update(part)
    left.update(x[:30])
    right.update(x[30:])
    left.merge(right)
    left.merge(Moments(7))
    expected = torch.cov(x.T)
    for moments in (streamed, left):
        assert moments.count == 101
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(moments.covariance, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moments.std, x.std(0), rtol=1e-9, atol=0)
    assert not Moments(3).covariance.any()
    with pytest.raises(ValueError, match="expected"):
        streamed.update(x[:, :6])


def test_code_use() -> None:
    counts = torch.tensor([5, 5, 0, 5, 5, 0, 0, 0])
    assert codes_used(counts) == 0.5 and perplexity(counts) == pytest.approx(4)
    assert perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)
    shares = [n / 110 for n in (1, 2, 3, 4, 100)]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert float(perplexity(torch.tensor([1, 2, 3, 4, 100]))) == pytest.approx(expected, rel=1e-6)
