"""Solvers that draw noise: their one-step law and their marginals in closed form.

On data where the denoiser is affine in x every solver is an affine map of (x, noise_0, noise_1, ...). Its coefficients
are measured by running it on unit inputs in float64; the variance of the result is then exact, without sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from darkroom.diffusion.grids import Grid, grid_from_levels, make_grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.solvers import SOLVERS, ddim, ddpm

CONFIGS = {
    "vp": (ScheduleConfig(), "trailing"),
    "flow": (ScheduleConfig(kind="flow"), "linear"),
    "edm": (ScheduleConfig(kind="edm"), "karras"),
}
Denoise = Callable[[Tensor, NoiseLevel], Tensor]


def scalar(value: float) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


def response(name: str, denoise: Denoise, grid: Grid, options: dict) -> tuple[float, float, list[float]]:
    """(constant, coefficient of x, coefficients of noise_i) of the affine map that a solver is."""

    def run(x: float, index: int | None) -> float:
        noise = lambda i: scalar(1.0 if i == index else 0.0)  # noqa: E731
        return float(SOLVERS[name](denoise, scalar(x), grid, noise, **options))

    constant = run(0.0, None)
    return constant, run(1.0, None) - constant, [run(0.0, i) - constant for i in range(2 * grid.steps)]


def inner_grid(kind: str, steps: int = 8) -> Grid:
    config, spacing = CONFIGS[kind]
    whole = make_grid(make_schedule(config), steps + 2, spacing)
    return grid_from_levels([whole[i] for i in range(1, steps + 2)], whole.schedule)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "name,options",
    [
        ("ddim", {"eta": 0.0}),
        ("ddim", {"eta": 0.4}),
        ("ddim", {"eta": 1.0}),
        ("ddpm", {"variance": "beta_tilde"}),
        ("euler", {"churn": 3.0}),
        ("euler_ancestral", {}),
        ("dpm2_ancestral", {"eta": 0.6}),
        ("dpm++2s_ancestral", {}),
        ("dpm++sde", {}),
        ("dpm++2m_sde", {"eta": 0.7}),
        ("dpm++2m_sde", {"correction": "heun"}),
        ("dpm++3m_sde", {}),
        ("lcm", {}),
    ],
)
def test_marginals_on_a_point_are_exact(kind: str, name: str, options: dict) -> None:
    """Data at a single point m: x must be N(alpha m, sigma^2) at every level, whatever eta or churn."""
    m = 0.8
    for steps in (1, 3, 8):
        grid = inner_grid(kind, steps)
        here, there = grid[0], grid[-1]
        constant, gain, fresh = response(name, lambda x, level: scalar(m), grid, options)
        mean = constant + gain * float(here.alpha) * m
        variance = (gain * float(here.sigma)) ** 2 + sum(c**2 for c in fresh)
        assert mean == pytest.approx(float(there.alpha) * m, rel=1e-10)
        assert variance == pytest.approx(float(there.sigma) ** 2, rel=1e-10)


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
def test_beta_variance_is_exact_on_standard_normal_data(steps: int) -> None:
    """Ho et al. 2020, section 3.2: beta is the variance for x0 ~ N(0, 1), where x stays N(0, 1) at every level."""
    schedule = make_schedule(ScheduleConfig())
    grid = make_grid(schedule, steps, "trailing", final="first" if steps < 1000 else "clean")
    if steps == 1000:
        grid = grid_from_levels([grid[i] for i in range(1000)], schedule)

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        return level.alpha * x

    x, variance = scalar(1.0), 1.0
    gain_of_step = lambda a, b: float(  # noqa: E731
        ddpm(denoise, x, grid_from_levels([a, b], schedule), lambda i: scalar(0.0), variance="beta")
    )
    noise_of_step = lambda a, b: float(  # noqa: E731
        ddpm(denoise, scalar(0.0), grid_from_levels([a, b], schedule), lambda i: scalar(1.0), variance="beta")
    )
    for i in range(grid.steps):
        variance = gain_of_step(grid[i], grid[i + 1]) ** 2 * variance + noise_of_step(grid[i], grid[i + 1]) ** 2
        assert variance == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_ddpm_step_is_the_posterior(kind: str) -> None:
    """q(x' | x, x0) by conditioning the joint Gaussian of (x', x) given x0, which ddpm.py does not do."""
    grid = inner_grid(kind, 1)
    here, there = grid[0], grid[1]
    x0, x = 0.7, -1.3
    a, s, a_next, s_next = (float(v) for v in (here.alpha, here.sigma, there.alpha, there.sigma))
    covariance = a / a_next * s_next**2
    mean = a_next * x0 + covariance / s**2 * (x - a * x0)
    variance = s_next**2 - covariance**2 / s**2
    step = lambda z, v: float(ddpm(lambda y, level: scalar(x0), scalar(x), grid, lambda i: scalar(z), variance=v))  # noqa: E731
    assert step(0.0, "beta_tilde") == pytest.approx(mean, rel=1e-12)
    assert (step(1.0, "beta_tilde") - mean) ** 2 == pytest.approx(variance, rel=1e-10)
    beta = s**2 - (a / a_next * s_next) ** 2
    assert (step(1.0, "beta") - mean) ** 2 == pytest.approx(beta, rel=1e-10)
    assert (step(1.0, 0.3) - mean) ** 2 == pytest.approx(0.3 * beta + 0.7 * variance, rel=1e-10)


def test_variances_are_those_of_the_table() -> None:
    """Between neighbours of the table they are beta and posterior_variance."""
    schedule = make_schedule(ScheduleConfig())
    for t in (1, 500, 999):
        grid = grid_from_levels([schedule.level(float(t)), schedule.level(float(t - 1))], schedule)
        for name, key in (("beta", "betas"), ("beta_tilde", "posterior_variance")):
            noise = float(ddpm(lambda x, level: scalar(0.0), scalar(0.0), grid, lambda i: scalar(1.0), variance=name))
            expected = float(schedule.buffers()[key][t])  # type: ignore[attr-defined]
            assert noise**2 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_ddim_with_eta_1_is_ddpm(kind: str) -> None:
    grid = inner_grid(kind)
    noise = lambda i: torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))  # noqa: E731
    denoise = lambda x, level: torch.tanh(x)  # noqa: E731
    one = ddim(denoise, noise(99), grid, noise, eta=1.0)
    torch.testing.assert_close(one, ddpm(denoise, noise(99), grid, noise), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", CONFIGS)
def test_noise_scale_is_a_factor_on_the_noise(kind: str) -> None:
    grid = inner_grid(kind)
    for name in ("ddim", "euler_ancestral", "dpm2_ancestral", "dpm++2s_ancestral", "dpm++sde", "dpm++2m_sde"):
        options = {"eta": 0.8}
        _, _, plain = response(name, lambda x, level: scalar(0.8), grid, options)
        _, _, halved = response(name, lambda x, level: scalar(0.8), grid, {**options, "noise_scale": 0.5})
        assert halved == pytest.approx([0.5 * c for c in plain], rel=1e-10) and any(plain)


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_fresh_noise_they_are_ode_solvers(kind: str) -> None:
    grid = inner_grid(kind)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoise = lambda x, level: torch.tanh(x)  # noqa: E731
    run = lambda name, **options: SOLVERS[name](denoise, x, grid, None, **options)  # noqa: E731
    for stochastic, ode in (
        ("euler_ancestral", "ddim"),
        ("dpm++2m_sde", "dpm++2m"),
        ("dpm2_ancestral", "dpm2"),
        ("dpm++sde", "dpm++2s_ancestral"),
    ):
        options = {"eta": 0.0} if "2s" in ode else {}
        torch.testing.assert_close(run(stochastic, eta=0.0), run(ode, **options), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name,eta", [("dpm++2m_sde", 1.0), ("dpm++2s_ancestral", 1.0), ("dpm++sde", 1.0), ("dpm++3m_sde", 0.5)]
)
def test_stochastic_solvers_reach_the_variance_of_a_gaussian(name: str, eta: float) -> None:
    """Data N(m, s^2) from pure noise: mean and variance of the result approach those of the data with finer steps."""
    m, s = 0.4, 0.5

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        a, sigma = level.alpha, level.sigma
        return m + a * s**2 / ((a * s) ** 2 + sigma**2) * (x - a * m)

    errors = []
    for steps in (24, 48):
        schedule = make_schedule(ScheduleConfig(kind="edm"))
        grid = make_grid(schedule, steps, "exponential", final="first", sigma_min=0.05, sigma_max=30.0)
        constant, gain, fresh = response(name, denoise, grid, {"eta": eta})
        variance = (gain * 30.0) ** 2 + sum(c**2 for c in fresh)
        exact = s**2 + 0.05**2
        errors.append(abs(variance - exact) / exact)
        assert constant + gain * m == pytest.approx(m, abs=0.03)
    # DPM++ SDE draws its two noises independently, which costs it accuracy.
    assert errors[1] < (0.15 if name == "dpm++sde" else 0.02) and errors[1] < 0.7 * errors[0], errors


def test_no_noise_on_arriving_at_the_data() -> None:
    for kind, (config, spacing) in CONFIGS.items():
        grid = make_grid(make_schedule(config), 5, spacing)
        denoise = lambda x, level: x * 0 + 0.3  # noqa: E731
        for name, options in (("ddim", {"eta": 1.0}), ("ddpm", {"variance": "beta"}), ("dpm++sde", {}), ("lcm", {})):
            out = SOLVERS[name](denoise, scalar(1.0), grid, lambda i: scalar(5.0), **options)
            assert float(out) == pytest.approx(0.3, abs=1e-12), kind


def test_ancestral_sampling_of_a_gaussian_reaches_its_variance() -> None:
    """Data N(m, s^2), 1000 steps: the law of the result is N(m, s^2) up to the discretisation, for both variances."""
    m, s = 0.4, 0.5
    schedule = make_schedule(ScheduleConfig())
    grid = make_grid(schedule, 1000, "trailing")

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        a, sigma = level.alpha, level.sigma
        return m + a * s**2 / ((a * s) ** 2 + sigma**2) * (x - a * m)

    for variance in ("beta", "beta_tilde"):
        # mean and variance by the recursion of one-step coefficients: 1000 steps of 3 runs each.
        mean, spread = 0.0, 1.0
        for i in range(grid.steps):
            pair = grid_from_levels([grid[i], grid[i + 1]], schedule)
            step = lambda x, z, pair=pair: float(  # noqa: E731
                ddpm(denoise, scalar(x), pair, lambda i: scalar(z), variance=variance)  # noqa: B023
            )
            constant = step(0.0, 0.0)
            gain, fresh = step(1.0, 0.0) - constant, step(0.0, 1.0) - constant
            mean, spread = constant + gain * mean, gain**2 * spread + fresh**2
        # The start ignores alpha_T m, of which 7 percent are left in x: the official start, N(0, 1).
        assert mean == pytest.approx(m, abs=0.01)
        assert math.sqrt(spread) == pytest.approx(s, rel=0.03)
