"""Solvers against the official DDIM sampler, k-diffusion and diffusers on a Gaussian with known denoiser."""

from __future__ import annotations

import pytest
import torch
from parity_data import Case, load_case, make_input
from torch import Tensor

from darkroom.diffusion.grids import Grid, grid_from_half_log_snr, make_grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.solvers import SOLVERS

SD = make_schedule(ScheduleConfig())
EDM = make_schedule(ScheduleConfig(kind="edm"))
MU, S = make_input(9001, (4, 3, 3)), 0.6
STEPS = (5, 10, 20)


def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
    """x0 of data N(mu, s^2)."""
    at = level.like(x)
    return MU.to(x) + at.alpha * S**2 * (x - at.alpha * MU.to(x)) / ((at.alpha * S) ** 2 + at.sigma**2)


def step_noise(i: int) -> Tensor:
    return make_input(9100 + i, (2, 4, 3, 3))


def run(name: str, case: Case, grid: Grid, x: Tensor, scaled: bool, **options: object) -> None:
    """Compare the trajectory and the result. scaled: the reference works with x/alpha (k-diffusion's frame)."""
    trajectory: list[Tensor] = []  # x at the beginning of every step
    evaluated: list[Tensor] = []  # x of every call of the denoiser; Heun has two in a step

    def callback(step: int, level: NoiseLevel, x: Tensor, x0: Tensor) -> None:
        trajectory.append(evaluated[-1])

    def recorded(x: Tensor, level: NoiseLevel) -> Tensor:
        evaluated.append(x / float(level.alpha) if scaled else x)
        return denoise(x, level)

    churned = "churn" in options
    final = SOLVERS[name](recorded, x, grid, step_noise, callback=callback, **options)
    if scaled:
        final = final / float(grid[-1].alpha)
    # Trajectories of k-diffusion begin near 12 or 15: compare relative to that.
    bound = 2e-5 if not scaled else 4e-5
    case.check("final", final, atol=bound)
    if not churned and "x_after_step" in case.spec["outputs"]:
        case.check("x_after_step", torch.stack([*evaluated[1:], final]), atol=2e-5, relative=1e-5)
    if not churned and "x_before_step" in case.spec["outputs"]:
        case.check("x_before_step", torch.stack(trajectory), atol=2e-5, relative=1e-5)


def sigmas_grid(sigmas: list[float] | Tensor, schedule: object) -> Grid:
    """The grid of a list of sigma/alpha whose last entry is 0."""
    values = torch.as_tensor(sigmas, dtype=torch.float64)
    assert float(values[-1]) == 0
    return grid_from_half_log_snr(-values[:-1].log(), schedule, append_clean=True)  # type: ignore[arg-type]


# --- the official DDIM sampler, and diffusers' DDIM --------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
def test_official_ddim(steps: int) -> None:
    case = load_case("solvers_ldm_analytic", f"ddim_{steps}")
    run("ddim", case, make_grid(SD, steps, "ddim"), make_input(9002, (2, 4, 3, 3)), scaled=False)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["ddim", "ddim_trailing_alpha_one", "ddim_v_zero_snr", "ddim_eta1"])
def test_ddim_of_diffusers(name: str, steps: int) -> None:
    case = load_case("solvers_diffusers", f"{name}_{steps}")
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=True)) if "zero_snr" in name else SD
    grid = make_grid(schedule, steps, "trailing" if "trailing" in name or "zero_snr" in name else "ddim")
    assert grid.levels.time[:-1].tolist() == case.output("timesteps")
    run("ddim", case, grid, case.input("x_T"), scaled=False, eta=1.0 if "eta1" in name else 0.0)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name,variance", [("ddpm", "beta_tilde"), ("ddpm_fixed_large", "beta")])
def test_ddpm_of_diffusers(name: str, variance: str, steps: int) -> None:
    case = load_case("solvers_diffusers", f"{name}_{steps}")
    run("ddpm", case, make_grid(SD, steps, "leading"), case.input("x_T"), scaled=False, variance=variance)


# --- diffusers' solvers in sigma ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["euler", "euler_linspace", "euler_karras", "euler_v", "heun", "heun_karras"])
def test_euler_and_heun_of_diffusers(name: str, steps: int) -> None:
    case = load_case("solvers_diffusers", f"{name}_{steps}")
    sigmas = case.output("sigmas")
    if name.startswith("heun"):
        # diffusers lists every inner level twice: once per evaluation.
        sigmas = torch.cat([sigmas[:1], sigmas[1::2]])
    grid = sigmas_grid(sigmas, SD)
    assert grid.steps == steps
    # init_noise_sigma of these schedulers is sqrt(sigma^2 + 1) for `leading`: x_T states it.
    x = case.input("x_T") * float(grid[0].alpha)
    run(name.split("_")[0], case, grid, x, scaled=True)


@pytest.mark.parametrize("steps", STEPS)
def test_karras_grid_of_diffusers(steps: int) -> None:
    """The grid itself as well, without being told the sigmas."""
    case = load_case("solvers_diffusers", f"heun_karras_{steps}")
    grid = make_grid(SD, steps, "karras")
    sigmas = case.output("sigmas")
    expected = torch.cat([sigmas[:1], sigmas[1::2]]).double()
    torch.testing.assert_close(grid.levels.sigma / grid.levels.alpha, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_linspace", "dpmpp_2m_karras", "dpmpp_2m_v"])
def test_dpm_plus_plus_2m_of_diffusers(name: str, steps: int) -> None:
    case = load_case("solvers_diffusers", f"{name}_{steps}")
    run("dpm++2m", case, sigmas_grid(case.output("sigmas"), SD), case.input("x_T"), scaled=False)


@pytest.mark.parametrize("steps", STEPS)
def test_flow_euler_of_diffusers(steps: int) -> None:
    case = load_case("solvers_diffusers", f"flow_euler_shift3_{steps}")
    grid = make_grid(make_schedule(ScheduleConfig(kind="flow", shift=3.0)), steps, "sd3")
    case.check("sigmas", grid.levels.sigma, atol=1e-6)
    times = torch.as_tensor(case.output("timesteps"), dtype=torch.float64)
    torch.testing.assert_close(grid.levels.time[:-1], times, rtol=1e-6, atol=1e-3)
    for name in ("euler", "ddim"):
        run(name, case, grid, case.input("x_T"), scaled=False)


# --- k-diffusion ---------------------------------------------------------------------------------------------------

K_GRIDS = ["karras_5", "karras_10", "karras_20", "exponential_10"]


@pytest.mark.parametrize("frame", ["edm", "vp"])
@pytest.mark.parametrize("sigmas", K_GRIDS)
@pytest.mark.parametrize("name,ours", [("euler", "euler"), ("heun", "heun"), ("dpmpp_2m", "dpm++2m")])
def test_k_diffusion(name: str, ours: str, sigmas: str, frame: str) -> None:
    """In EDM's own frame, and the same numbers from a variance-preserving table."""
    case = load_case("solvers_k_diffusion", f"{name}_{sigmas}")
    values = load_case("solvers_k_diffusion", "sigmas").output(sigmas)
    grid = sigmas_grid(values, EDM if frame == "edm" else SD)
    run(ours, case, grid, case.input("x") * float(grid[0].alpha), scaled=True)


@pytest.mark.parametrize("frame", ["edm", "vp"])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn_of_k_diffusion(name: str, frame: str) -> None:
    case = load_case("solvers_k_diffusion", f"{name}_churn_karras_10")
    args = case.args
    grid = sigmas_grid(load_case("solvers_k_diffusion", "sigmas").output("karras_10"), EDM if frame == "edm" else SD)
    run(
        name,
        case,
        grid,
        case.input("x") * float(grid[0].alpha),
        scaled=True,
        churn=args["s_churn"],
        churn_min=args["s_tmin"],
        churn_max=args["s_tmax"],
        churn_noise=args["s_noise"],
    )
