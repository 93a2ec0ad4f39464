"""Distributions of training times: range, moments and quantiles against closed forms; draws belong to the generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from darkroom.diffusion.schedules import NoiseSchedule, ScheduleConfig, make_schedule
from darkroom.diffusion.time_sampling import TIME_SAMPLINGS, TimeSamplingConfig, sample_time
from darkroom.errors import DarkroomError


def draw(schedule: NoiseSchedule, count: int = 100_000, **options: object) -> Tensor:
    config = TimeSamplingConfig(**options)  # type: ignore[arg-type]
    return sample_time(config, schedule, count, torch.Generator().manual_seed(5))


def schedule(kind: str, **options: object) -> NoiseSchedule:
    return make_schedule(ScheduleConfig(kind=kind, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ldm", "flow", "edm"])
@pytest.mark.parametrize("sampling", TIME_SAMPLINGS)
@pytest.mark.parametrize("stratified", [False, True])
def test_range_and_repeatability(kind: str, sampling: str, stratified: bool) -> None:
    one = draw(schedule(kind), 1000, time_sampling=sampling, stratified=stratified)
    low, high = schedule(kind).time_range
    assert one.shape == (1000,) and one.dtype == torch.float64 and one.device.type == "cpu"
    assert one.isfinite().all() and one.min() >= low and one.max() <= high
    assert torch.equal(one, draw(schedule(kind), 1000, time_sampling=sampling, stratified=stratified))


def test_uniform_hits_every_integer_equally() -> None:
    time = draw(schedule("ldm", timesteps=10))
    counts = torch.bincount(time.long(), minlength=10)
    assert torch.equal(time, time.round()) and counts.shape == (10,)
    # Binomial with p = 0.1: five standard deviations are 475.
    assert (counts - 10_000).abs().max() < 475
    continuous = draw(schedule("ldm"), time_sampling="uniform_continuous")
    assert (continuous != continuous.round()).float().mean() > 0.99
    assert float(continuous.mean()) == pytest.approx(999 / 2, abs=5)


def test_logit_normal() -> None:
    """Esser et al. 2024, eq. 19: logit(s) is normal."""
    s = draw(schedule("flow"), time_sampling="logit_normal", time_mean=0.4, time_std=0.8) / 1000
    logit = torch.logit(s)
    assert float(logit.mean()) == pytest.approx(0.4, abs=0.015) and float(logit.std()) == pytest.approx(0.8, abs=0.015)


def test_shift_adds_log_shift_to_the_logit() -> None:
    """shift*s/(1+(shift-1)*s) is a shift of logit(s) by log(shift)."""
    s = draw(schedule("flow", shift=3.0), time_sampling="logit_normal") / 1000
    assert float(torch.logit(s).median()) == pytest.approx(torch.log(torch.tensor(3.0)).item(), abs=0.02)
    uniform = draw(schedule("flow", shift=3.0)) / 1000
    assert float(uniform.median()) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.01)


def test_times_follow_the_size_of_latents() -> None:
    """With four times the places the same draws are shifted twice as much; other schedules do not care."""
    flow = schedule("flow", shift=1.5, shift_rule="sqrt")
    config = TimeSamplingConfig(time_sampling="logit_normal")
    small, large, unknown = (
        torch.logit(sample_time(config, flow, 1000, torch.Generator().manual_seed(0), places) / 1000)
        for places in (1024, 4096, None)
    )
    torch.testing.assert_close(large - small, torch.full_like(small, math.log(2)))
    assert torch.equal(small, unknown)
    for kind in ("ldm", "edm"):
        one, other = (
            sample_time(TimeSamplingConfig(), schedule(kind), 8, torch.Generator().manual_seed(0), places)
            for places in (16, None)
        )
        assert torch.equal(one, other)


def test_edm_distribution() -> None:
    """Karras et al. 2022, table 1: log(sigma) is normal with mean -1.2 and deviation 1.2, whatever the schedule."""
    for kind in ("edm", "flow", "ldm"):
        at = schedule(kind)
        log_ratio = -at.level(draw(at, time_sampling="edm")).half_log_snr
        middle = torch.quantile(log_ratio[:50_000], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        expected = torch.tensor([-1.2 - 0.67449 * 1.2, -1.2, -1.2 + 0.67449 * 1.2], dtype=torch.float64)
        torch.testing.assert_close(middle, expected, rtol=0, atol=0.03)


def test_stratified_draws_fill_every_stratum() -> None:
    time = draw(schedule("flow"), 64, stratified=True)
    assert torch.equal((time / 1000 * 64).floor().long().sort().values, torch.arange(64))


def test_unknown_sampling() -> None:
    with pytest.raises(DarkroomError):
        draw(schedule("ldm"), time_sampling="nonsense")
