"""Levels and the noise that belongs to an image."""

from __future__ import annotations

import math

import pytest
import torch

from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.diffusion.noise import SeededNoise


def level(*values: float) -> NoiseLevel:
    alpha, sigma, time = (torch.tensor(v, dtype=torch.float64) for v in values)
    return NoiseLevel(alpha, sigma, time)


def test_half_log_snr() -> None:
    assert float(level(0.6, 0.3, 0.0).half_log_snr) == pytest.approx(math.log(2))
    assert float(level(1.0, 0.0, 0.0).half_log_snr) == math.inf
    assert float(level(0.0, 1.0, 0.0).half_log_snr) == -math.inf


def test_add_noise_per_example() -> None:
    batch = NoiseLevel(torch.tensor([1.0, 0.6]), torch.tensor([0.0, 0.8]), torch.tensor([0.0, 5.0]))
    x0, noise = torch.full((2, 3, 2, 2), 2.0), torch.full((2, 3, 2, 2), -1.0)
    x = add_noise(x0, noise, batch)
    assert torch.allclose(x[0], torch.tensor(2.0)) and torch.allclose(x[1], torch.tensor(0.4))
    torch.testing.assert_close(add_noise(x0[1:], noise[1:], level(0.6, 0.8, 5.0)), x[1:])


def test_like_takes_dtype_but_leaves_the_time() -> None:
    x = torch.zeros(4, 3, 2, 2, dtype=torch.bfloat16)
    at = level(0.6, 0.8, 123.456).like(x)
    assert at.alpha.dtype == torch.bfloat16 and at.time.dtype == torch.float64 and at.time.shape == (4,)
    many = NoiseLevel(torch.rand(4), torch.rand(4), torch.rand(4), target_time=torch.tensor(0.5)).like(x)
    assert many.alpha.shape == (4, 1, 1, 1) and many.target_time is not None and many.target_time.shape == (4,)


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    together = SeededNoise([3, 5, 7], (2, 4, 4))
    alone = SeededNoise([5], (2, 4, 4))
    for i in (0, 1, 4, 2, 2):
        assert torch.equal(together(i)[1:2], alone(i))
    assert not torch.equal(alone(0), alone(1))
    many = torch.cat([SeededNoise(list(range(64)), (4, 8, 8))(i) for i in range(2)])
    assert abs(float(many.mean())) < 0.03 and float(many.std()) == pytest.approx(1, abs=0.02)
