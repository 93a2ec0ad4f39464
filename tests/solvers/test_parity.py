"""Solvers against the official samplers, DPM-Solver, k-diffusion and diffusers on a Gaussian with known denoiser."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from parity_data import Case, case_names, load_case, make_input
from torch import Tensor

from darkroom.diffusion.grids import Grid, grid_from_half_log_snr, make_grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.schedules import NoiseSchedule, ScheduleConfig, make_schedule
from darkroom.solvers import SOLVERS
from darkroom.solvers.dpm import dpm_multistep

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
    called: list[NoiseLevel] = []

    def callback(step: int, level: NoiseLevel, x: Tensor, x0: Tensor) -> None:
        trajectory.append(evaluated[-1])

    def recorded(x: Tensor, level: NoiseLevel) -> Tensor:
        evaluated.append(x / float(level.alpha) if scaled else x)
        called.append(level)
        return denoise(x, level)

    churned = "churn" in options
    final = SOLVERS[name](recorded, x, grid, step_noise, callback=callback, **options)
    if scaled:
        final = final / float(grid[-1].alpha)
    # Trajectories of k-diffusion begin near 12 or 15: compare relative to that.
    bound = 2e-5 if not scaled else 4e-5
    case.check("final", final, atol=bound)
    outputs = case.spec["outputs"]
    if "model_call_sigmas" in outputs:
        sigmas = [float(level.sigma / level.alpha) for level in called]
        assert sigmas == pytest.approx(outputs["model_call_sigmas"]["value"], rel=1e-5)
    if "timesteps" in outputs and name != "plms":  # which has the second time twice
        expected = case.output("timesteps")
        rounded = all(time == int(time) for time in expected)
        assert [float(level.time) for level in called] == pytest.approx(expected, abs=0.5 if rounded else 3e-3)
    if not churned and "x_after_step" in outputs:
        case.check("x_after_step", torch.stack([*evaluated[1:], final]), atol=2e-5, relative=1e-5)
    if not churned and "x_before_step" in outputs:
        case.check("x_before_step", torch.stack(trajectory), atol=2e-5, relative=1e-5)


def sigmas_grid(sigmas: list[float] | Tensor, schedule: NoiseSchedule) -> Grid:
    """The grid of a list of sigma/alpha, whose last entry may be 0."""
    values = torch.as_tensor(sigmas, dtype=torch.float64)
    clean = float(values[-1]) == 0
    return grid_from_half_log_snr(-values[: len(values) - clean].log(), schedule, append_clean=clean)


# --- the official DDIM sampler, and diffusers' DDIM --------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
def test_official_ddim(steps: int) -> None:
    case = load_case("solvers_ldm_analytic", f"ddim_{steps}")
    run("ddim", case, make_grid(SD, steps, "ddim"), make_input(9002, (2, 4, 3, 3)), scaled=False)


@pytest.mark.parametrize("steps", STEPS)
def test_official_plms(steps: int) -> None:
    case = load_case("solvers_ldm_analytic", f"plms_{steps}")
    run("plms", case, make_grid(SD, steps, "ddim"), make_input(9002, (2, 4, 3, 3)), scaled=False)


@pytest.mark.parametrize("steps", STEPS)
def test_plms_of_diffusers(steps: int) -> None:
    case = load_case("solvers_diffusers", f"pndm_plms_{steps}")
    grid = make_grid(SD, steps, "ddim")
    times = case.output("timesteps")
    assert grid.levels.time[:-1].tolist() == times[:1] + times[2:], "the second time is evaluated twice"
    run("plms", case, grid, case.input("x_T"), scaled=False)


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
@pytest.mark.parametrize("name", ["euler_ancestral", "lms"])
def test_other_solvers_in_sigma_of_diffusers(name: str, steps: int) -> None:
    case = load_case("solvers_diffusers", f"{name}_{steps}")
    grid = sigmas_grid(case.output("sigmas"), SD)
    run(name, case, grid, case.input("x_T") * float(grid[0].alpha), scaled=True)


MULTISTEP: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m": ("dpm++2m", {}),
    "dpmpp_2m_linspace": ("dpm++2m", {}),
    "dpmpp_2m_karras": ("dpm++2m", {}),
    "dpmpp_2m_v": ("dpm++2m", {}),
    "dpmpp_2m_heun": ("dpm++2m", {"correction": "heun"}),
    "dpmpp_3m": ("dpm++3m", {}),
    "dpmsolver_2": ("dpm", {}),
    "dpmpp_2m_sde": ("dpm++2m_sde", {}),
    "dpmpp_2m_sde_karras": ("dpm++2m_sde", {}),
    "deis": ("deis", {}),
    "unipc": ("unipc", {}),
    "unipc_bh1": ("unipc", {"variant": "bh1"}),
    "unipc_3": ("unipc", {"order": 3}),
    "unipc_karras": ("unipc", {}),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_solvers_of_diffusers(name: str, steps: int) -> None:
    case = load_case("solvers_diffusers", f"{name}_{steps}")
    ours, options = MULTISTEP[name]
    if ours in ("dpm++2m", "dpm++3m", "dpm", "deis") and steps < 15:
        options = {**options, "lower_order_final": True}  # diffusers' rule for short runs
    run(ours, case, sigmas_grid(case.output("sigmas"), SD), case.input("x_T"), scaled=False, **options)


def test_every_solver_of_diffusers_is_covered() -> None:
    covered = {"ddim", "ddim_trailing_alpha_one", "ddim_v_zero_snr", "ddim_eta1", "pndm_plms", "ddpm"}
    covered |= {"ddpm_fixed_large", "euler", "euler_linspace", "euler_karras", "euler_v", "heun", "heun_karras"}
    covered |= {"euler_ancestral", "lms", "flow_euler_shift3", *MULTISTEP}
    assert {name.rsplit("_", 1)[0] for name in case_names("solvers_diffusers")} == covered


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
K_SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("euler", {}),
    "heun": ("heun", {}),
    "dpm_2": ("dpm2", {}),
    "lms": ("lms", {}),
    "dpmpp_2m": ("dpm++2m", {}),
    "euler_ancestral": ("euler_ancestral", {}),
    "dpm_2_ancestral": ("dpm2_ancestral", {}),
    "dpmpp_2s_ancestral": ("dpm++2s_ancestral", {}),
    "dpmpp_sde": ("dpm++sde", {}),
    "dpmpp_2m_sde": ("dpm++2m_sde", {}),
    "dpmpp_2m_sde_heun": ("dpm++2m_sde", {"correction": "heun"}),
    "dpmpp_3m_sde": ("dpm++3m_sde", {}),
}


@pytest.mark.parametrize("frame", ["edm", "vp"])
@pytest.mark.parametrize("sigmas", K_GRIDS)
@pytest.mark.parametrize("name", K_SOLVERS)
def test_k_diffusion(name: str, sigmas: str, frame: str) -> None:
    """In EDM's own frame, and the same numbers from a variance-preserving table."""
    case = load_case("solvers_k_diffusion", f"{name}_{sigmas}")
    values = load_case("solvers_k_diffusion", "sigmas").output(sigmas)
    grid = sigmas_grid(values, EDM if frame == "edm" else SD)
    ours, options = K_SOLVERS[name]
    run(ours, case, grid, case.input("x") * float(grid[0].alpha), scaled=True, **options)


def test_every_solver_of_k_diffusion_is_covered() -> None:
    names = {f"{name}_{sigmas}" for name in K_SOLVERS for sigmas in K_GRIDS}
    others = {"sigmas", "discrete_schedule_sd", "euler_churn_karras_10", "heun_churn_karras_10"}
    assert set(case_names("solvers_k_diffusion")) == names | others


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


# --- the official DPM-Solver ----------------------------------------------------------------------------------------


def official_half_log_snr(t: np.ndarray) -> np.ndarray:
    """Of its own continuous time t in (0, 1]: log alpha is linear between the table's entries, at (i + 1)/1000."""
    table = SD.level(torch.arange(1000.0)).alpha.log().numpy()
    log_alpha = np.interp(t, np.arange(1, 1001) / 1000, table)
    return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))


def official_levels(kind: str, steps: int) -> Grid:
    """Its runs go from t = 1 to t = 1/1000."""
    if kind == "logSNR":
        ends = official_half_log_snr(np.array([1.0, 1e-3]))
        values = torch.linspace(*ends.tolist(), steps + 1, dtype=torch.float64)
    else:
        power = 2 if kind == "time_quadratic" else 1
        t = np.linspace(1.0, 1e-3 ** (1 / power), steps + 1) ** power
        values = torch.from_numpy(official_half_log_snr(t))
    alpha, sigma = torch.sigmoid(2 * values).sqrt(), torch.sigmoid(-2 * values).sqrt()
    return Grid(NoiseLevel(alpha, sigma, SD.time_at_half_log_snr(values)), SD)


@pytest.mark.parametrize("name", [n for n in case_names("solvers_dpm_official") if n != "noise_schedule"])
def test_official_dpm_solver(name: str) -> None:
    case = load_case("solvers_dpm_official", name)
    a = case.args
    final = dpm_multistep(
        denoise,
        make_input(9002, (2, 4, 3, 3)),
        official_levels(a["skip_type"], a["steps"]),
        variable="x0" if a["predict_x0"] else "epsilon",
        order=a["order"],
        lower_order_final=a["lower_order_final"] and a["steps"] < 15,
    )
    case.check("final", final, atol=3e-5)


def test_times_of_the_official_dpm_solver() -> None:
    """Its schedule, from which the grids above are made, against its own numbers."""
    case = load_case("solvers_dpm_official", "noise_schedule")
    ours = official_half_log_snr(case.input("t").double().numpy())
    np.testing.assert_allclose(case.output("marginal_lambda"), ours, atol=2e-5)
    log_alpha = -0.5 * np.log1p(np.exp(-2 * ours))
    np.testing.assert_allclose(case.output("marginal_log_mean_coeff"), log_alpha, atol=2e-5)
    np.testing.assert_allclose(case.output("marginal_alpha"), np.exp(log_alpha), atol=2e-5)
    np.testing.assert_allclose(case.output("marginal_std"), np.sqrt(-np.expm1(2 * log_alpha)), atol=2e-5)
    np.testing.assert_allclose(case.output("inverse_lambda_of_that"), case.input("t"), atol=2e-5)
    for steps in STEPS:
        np.testing.assert_allclose(case.output(f"time_uniform_{steps}"), np.linspace(1, 1e-3, steps + 1), atol=1e-6)
