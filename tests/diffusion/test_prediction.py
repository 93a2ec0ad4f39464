"""Conversions between raw outputs and x0: closed forms and round trips in float64, and the official values."""

from __future__ import annotations

import pytest
import torch
from gaussian_mixture import GaussianMixture
from parity_data import load_case
from torch import Tensor

from darkroom.denoiser import Denoiser
from darkroom.diffusion import prediction
from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule

SHAPE = (5, 3, 4, 2)


def some(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inner_levels(kind: str) -> NoiseLevel:
    """Five levels (B,) with both alpha and sigma above 0."""
    schedule = make_schedule(ScheduleConfig(kind=kind))  # type: ignore[arg-type]
    low, high = schedule.finite_half_log_snr_range
    return schedule.level_at_half_log_snr(torch.linspace(low, high, 5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["ldm", "flow", "edm"])
@pytest.mark.parametrize("prediction_type", prediction.PREDICTION_TYPES)
def test_target_and_x0_are_inverse(kind: str, prediction_type: str) -> None:
    level, x0, noise = inner_levels(kind), some(1), some(2)
    x = add_noise(x0, noise, level)
    if prediction_type == "edm":
        raw = prediction.edm_target(x0, noise, level, 0.7)
        back = prediction.x0_from_edm(x, raw, level, 0.7)
    else:
        raw = prediction.TARGETS[prediction_type](x0, noise, level)
        back = prediction.X0_FROM_RAW[prediction_type](x, raw, level)
    # Float64 rounding, magnified where x is nearly all noise and x0 has to be divided out of it.
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-12 * float((level.sigma / level.alpha).max() + 1))
    torch.testing.assert_close(prediction.epsilon_from_x0(x, x0, level), noise, rtol=0, atol=1e-11)


def test_closed_forms_at_one_level() -> None:
    """A 3-4-5 triangle: alpha = 0.6, sigma = 0.8, x0 = 2, noise = -1, so x = 0.4."""
    level = NoiseLevel(*(torch.tensor(v, dtype=torch.float64) for v in (0.6, 0.8, 0.0)))
    one = torch.ones(1, 1, dtype=torch.float64)
    x0, noise = 2 * one, -one
    x = add_noise(x0, noise, level)
    assert float(x) == pytest.approx(0.4)
    assert float(prediction.v_target(x0, noise, level)) == pytest.approx(0.6 * -1 - 0.8 * 2)
    assert float(prediction.velocity_target(x0, noise, level)) == -3
    assert float(prediction.x0_from_epsilon(x, noise, level)) == pytest.approx(2)
    assert float(prediction.x0_from_v(x, -2.2 * one, level)) == pytest.approx(2)
    assert float(prediction.epsilon_from_v(x, -2.2 * one, level)) == pytest.approx(-1)
    assert float(prediction.x0_from_velocity(x, -3 * one, level)) == pytest.approx(2)


def test_edm_scalings_have_the_properties_they_were_derived_from() -> None:
    """Karras et al. 2022, App. B.6: unit variance of input and target, and c_skip minimises c_out."""
    sigma_data = 0.7
    for kind in ("ldm", "flow", "edm"):
        level = inner_levels(kind)
        c_skip, c_out, c_in, c_noise = prediction.edm_scalings(level, sigma_data)
        a2d2, s2 = level.alpha**2 * sigma_data**2, level.sigma**2
        one = torch.ones_like(c_in)
        torch.testing.assert_close(c_in**2 * (a2d2 + s2), one)
        residual = sigma_data**2 * (1 - c_skip * level.alpha) ** 2 + c_skip**2 * s2
        torch.testing.assert_close(residual, c_out**2)
        for other in (0.99, 1.01):
            worse = sigma_data**2 * (1 - other * c_skip * level.alpha) ** 2 + (other * c_skip) ** 2 * s2
            assert (worse >= residual).all()
        torch.testing.assert_close(c_noise, torch.log(level.sigma / level.alpha) / 4)
    # alpha = 1: the table of the paper.
    level = inner_levels("edm")
    s = level.sigma
    c_skip, c_out, c_in, c_noise = prediction.edm_scalings(level, sigma_data)
    torch.testing.assert_close(c_skip, sigma_data**2 / (s**2 + sigma_data**2))
    torch.testing.assert_close(c_out, s * sigma_data / (s**2 + sigma_data**2).sqrt())
    # The time of an EDM schedule is c_noise: the network is told the same by either name.
    torch.testing.assert_close(c_noise, level.time, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)], ids=["pure-noise", "data"])
def test_ends_are_finite(ends: tuple[float, float], dtype: torch.dtype) -> None:
    level = NoiseLevel(*(torch.tensor(v, dtype=torch.float64) for v in (*ends, 0.0)))
    x0, noise = some(1).to(dtype), some(2).to(dtype)
    x = add_noise(x0, noise, level)
    for name in prediction.PREDICTION_TYPES:
        if name == "epsilon" and ends[0] == 0:
            continue
        if name == "edm":
            raw = prediction.edm_target(x0, noise, level, 0.5)
            back = prediction.x0_from_edm(x, raw, level, 0.5)
        else:
            raw = prediction.TARGETS[name](x0, noise, level)
            back = prediction.X0_FROM_RAW[name](x, raw, level)
        assert raw.dtype == back.dtype == dtype and raw.isfinite().all()
        torch.testing.assert_close(back, x0, rtol=0, atol=1e-5)
    assert prediction.epsilon_from_x0(x, x0, level).isfinite().all()


def test_official_conversions() -> None:
    """q_sample, x0 and epsilon from v, and the posterior q(x_{t-1} | x_t, x_0) of the official code."""
    case = load_case("schedules_ldm", "parameterisation_scalars")
    schedule = make_schedule(ScheduleConfig(beta_start=0.0015, beta_end=0.0195))
    x0, noise, time = case.input("x0"), case.input("eps"), case.input("t")
    level = schedule.level(time)
    x = add_noise(x0, noise, level)
    case.check("x_t", x)
    v = prediction.v_target(x0, noise, level)
    case.check("v", v)
    case.check("x0_from_v", prediction.x0_from_v(x, v, level))
    case.check("eps_from_v", prediction.epsilon_from_v(x, v, level))
    # At t = 999 sigma/alpha is 150: both sides lose seven bits of float32 there.
    case.check("x0_from_eps", prediction.x0_from_epsilon(x, noise, level), atol=2e-4)
    buffers = schedule.buffers()  # type: ignore[attr-defined]
    column = {name: table[time].view(-1, 1, 1, 1) for name, table in buffers.items()}
    case.check("posterior_mean", column["posterior_mean_coef1"] * x0 + column["posterior_mean_coef2"] * x)
    case.check("posterior_variance", column["posterior_variance"])
    case.check("posterior_log_variance_clipped", column["posterior_log_variance_clipped"])
    at = level.like(x)
    case.check("q_mean", (at.alpha * x0).float())
    case.check("q_variance", at.sigma**2)
    case.check("q_log_variance", 2 * at.sigma.log())
    assert len(case.spec["outputs"]) == 11


@pytest.mark.parametrize("kind", ["ldm", "flow", "edm"])
def test_mixture_denoiser_obeys_tweedie(kind: str, gaussian_mixture: GaussianMixture) -> None:
    """E[x0|x] = (x + sigma^2 score) / alpha, with the score from automatic differentiation of log p."""
    level = inner_levels(kind)
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = x * level.like(x).sigma + 0.3
    x.requires_grad_(True)
    (score,) = torch.autograd.grad(gaussian_mixture.log_density(x, level).sum(), x)
    at = level.like(x)
    torch.testing.assert_close(gaussian_mixture.score(x, level), score)
    expected = (x + at.sigma**2 * score) / at.alpha
    torch.testing.assert_close(gaussian_mixture.x0(x, level), expected.detach(), rtol=0, atol=1e-9)


def test_every_prediction_type_is_known_to_the_denoiser() -> None:
    schedule = make_schedule(ScheduleConfig())
    for name in prediction.PREDICTION_TYPES:
        assert Denoiser(torch.nn.Identity(), schedule, name).prediction_type == name
