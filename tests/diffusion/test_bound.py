"""The terms of the variational bound against torch.distributions and by their own sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from darkroom.diffusion.bound import (
    discretised_gaussian_nll,
    gaussian_nll,
    log_variance_between,
    normal_kl,
    posterior_mean,
    step_log_variances,
)
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_kl_and_density() -> None:
    mean, log_variance, other, other_log_variance = (some(i, 50) for i in range(4))
    one, two = Normal(mean, (log_variance / 2).exp()), Normal(other, (other_log_variance / 2).exp())
    torch.testing.assert_close(normal_kl(mean, log_variance, other, other_log_variance), kl_divergence(one, two))
    torch.testing.assert_close(gaussian_nll(other, mean, log_variance), -one.log_prob(other))
    assert not normal_kl(mean, log_variance, mean, log_variance).any()


@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(kind="cosine"), ScheduleConfig(kind="linear")])
def test_variances_are_those_of_the_table(config: ScheduleConfig) -> None:
    schedule = make_schedule(config)
    buffers = schedule.buffers()  # type: ignore[attr-defined]
    time = torch.arange(1, 1000)
    least, most = step_log_variances(schedule.level(time), schedule.level(time - 1))
    torch.testing.assert_close(most.exp().float(), buffers["betas"][1:], rtol=2e-6, atol=0)
    torch.testing.assert_close(least.exp().float(), buffers["posterior_variance"][1:], rtol=2e-6, atol=0)
    x, x0 = some(1, 999, 2), some(2, 999, 2)
    expected = buffers["posterior_mean_coef1"][1:, None] * x0 + buffers["posterior_mean_coef2"][1:, None] * x
    ours = posterior_mean(x, x0, schedule.level(time), schedule.level(time - 1))
    torch.testing.assert_close(ours, expected.double(), rtol=1e-5, atol=1e-6)


def test_the_step_to_the_data() -> None:
    schedule = make_schedule(ScheduleConfig())
    zero, clean = schedule.level(torch.zeros(2)), schedule.level(-torch.ones(2))
    least, most = step_log_variances(zero, clean)
    assert least.eq(-math.inf).all()
    torch.testing.assert_close(most.exp().float(), schedule.buffers()["betas"][:1].expand(2))  # type: ignore[attr-defined]
    x, x0 = some(1, 2, 3), some(2, 2, 3)
    torch.testing.assert_close(posterior_mean(x, x0, zero, clean), x0)


def test_logarithms_are_mixed() -> None:
    least, most = torch.tensor([-4.0, -3.0]), torch.tensor([-1.0, -2.0])
    share = torch.tensor([[[[0.0]], [[1.0]]], [[[0.5]], [[2.0]]]])
    mixed = log_variance_between(share, least, most)
    torch.testing.assert_close(mixed.flatten(), torch.tensor([-4.0, -1.0, -2.5, -1.0]))


@pytest.mark.parametrize("bins", [4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masses_of_all_bins_sum_to_one(bins: int, dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, bins, dtype=dtype)
    for mean, deviation in ((0.0, 0.5), (0.9, 0.01), (-1.3, 0.2), (0.2, 30.0)):
        log_variance = torch.full_like(values, 2 * math.log(deviation))
        masses = torch.exp(-discretised_gaussian_nll(values, torch.full_like(values, mean), log_variance, bins))
        assert float(masses.sum()) == pytest.approx(1, abs=1e-5)


def test_narrow_bins_are_the_density_times_their_width() -> None:
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)[100:150]
    mean, log_variance = torch.zeros_like(x), torch.zeros_like(x)
    width = 2 / 255
    density = gaussian_nll(x, mean, log_variance) - math.log(width)
    torch.testing.assert_close(discretised_gaussian_nll(x, mean, log_variance), density, atol=1e-5, rtol=0)


def test_far_tails_stay_finite_and_have_gradients() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0])
    mean = torch.tensor([5.0, -9.0, -5.0], requires_grad=True)
    log_variance = torch.full((3,), -8.0, requires_grad=True)
    loss = discretised_gaussian_nll(x, mean, log_variance)
    loss.sum().backward()
    assert loss.isfinite().all() and float(loss.detach().max()) <= -math.log(1e-12) + 1e-4
    assert mean.grad is not None and mean.grad.isfinite().all()
    assert log_variance.grad is not None and log_variance.grad.isfinite().all()
