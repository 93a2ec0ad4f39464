"""Inference grids against the official ones and their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from parity_data import case_names, load_case

from darkroom.diffusion.grids import SNR_SPACINGS, SPACINGS, TABLE_SPACINGS, grid_from_half_log_snr, make_grid
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError
from darkroom.solvers import ddim

LDM = make_schedule(ScheduleConfig(beta_start=0.0015, beta_end=0.0195))
SD = make_schedule(ScheduleConfig())
FLOW = make_schedule(ScheduleConfig(kind="flow"))
EDM = make_schedule(ScheduleConfig(kind="edm"))
DDIM_CASES = [n for n in case_names("schedules_ldm") if n.startswith("ddim_")]


def test_ddim_goldens_are_all_here() -> None:
    assert len(DDIM_CASES) == 9


@pytest.mark.parametrize("name", [n for n in DDIM_CASES if n != "ddim_uniform_999"])
def test_official_ddim_subschedules(name: str) -> None:
    """Times, alphas, alphas_prev, and the deviation of the fresh noise for every eta."""
    case = load_case("schedules_ldm", name)
    _, spacing, steps = name.split("_")
    grid = make_grid(LDM, int(steps), {"uniform": "ddim", "quad": "quad"}[spacing])
    assert torch.equal(grid.levels.time[:-1].flip(0).long(), case.output("timesteps"))
    alphas = grid.levels.alpha**2
    case.check("alphas", alphas[:-1].flip(0), atol=1e-7)
    case.check("alphas_prev", alphas[1:].flip(0), atol=1e-7)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for eta in (0.0, 0.5, 1.0):
        fresh = []
        for i in range(grid.steps):
            # Nothing but the fresh noise is left of a step from 0 with the estimate 0 and noise 1.
            pair = grid_from_half_log_snr(grid.levels.half_log_snr[i : i + 2], LDM)
            fresh.append(ddim(lambda x, level: zero, zero, pair, lambda i: one, eta=eta))
        case.check(f"sigmas_eta{eta}", torch.cat(fresh).flip(0), atol=1e-6)


def test_the_official_grid_that_runs_past_its_table_is_refused() -> None:
    times = load_case("schedules_ldm", "ddim_uniform_999").output("timesteps")
    assert int(times.max()) == 1000
    with pytest.raises(DarkroomError, match="trailing"):
        make_grid(LDM, 999, "ddim")


@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("name,spacing", [("ddim", "ddim"), ("ddim_trailing_alpha_one", "trailing")])
def test_times_of_diffusers(name: str, spacing: str, steps: int) -> None:
    times = load_case("solvers_diffusers", f"{name}_{steps}").output("timesteps")
    assert make_grid(SD, steps, spacing).levels.time[:-1].tolist() == times


def test_linspace_and_leading_times_of_diffusers() -> None:
    for steps in (5, 10, 20):
        times = load_case("solvers_diffusers", f"euler_linspace_{steps}").output("timesteps")
        ours = make_grid(SD, steps, "linspace").levels.time[:-1]
        torch.testing.assert_close(ours, torch.tensor(times, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        times = load_case("solvers_diffusers", f"ddpm_{steps}").output("timesteps")
        assert make_grid(SD, steps, "leading").levels.time[:-1].tolist() == times
    linspace = make_grid(SD, 9, "linspace", final="first")
    assert linspace.steps == 9 and float(linspace[-1].time) == 0 and (linspace.levels.time.diff() < 0).all()
    with pytest.raises(DarkroomError, match="clean"):
        make_grid(SD, 10, "leading", final="first")


@pytest.mark.parametrize(
    "name,spacing",
    [("karras_5", "karras"), ("karras_10", "karras"), ("karras_20", "karras"), ("exponential_10", "exponential")],
)
def test_sigmas_of_k_diffusion(name: str, spacing: str) -> None:
    steps = int(name.split("_")[1])
    for schedule in (EDM, SD):
        grid = make_grid(schedule, steps, spacing, sigma_min=0.05, sigma_max=12.0)
        load_case("solvers_k_diffusion", "sigmas").check(name, grid.levels.sigma / grid.levels.alpha, relative=1e-6)


def test_sigmas_of_k_diffusion_on_the_discrete_schedule() -> None:
    case = load_case("solvers_k_diffusion", "discrete_schedule_sd")
    for steps in (5, 10, 20, 50):
        grid = make_grid(SD, steps, "linspace")
        case.check(f"get_sigmas_{steps}", grid.levels.sigma / grid.levels.alpha, relative=1e-5)


@pytest.mark.parametrize("steps", [5, 10, 20, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_of_sd3(shift: float, steps: int) -> None:
    case = load_case("sd3", f"flow_sigmas_shift{shift:.0f}")
    schedule = make_schedule(ScheduleConfig(kind="flow", shift=shift))
    case.check(f"official_{steps}", make_grid(schedule, steps, "sd3").levels.sigma, atol=1e-6)
    case.check(f"diffusers_{steps}", make_grid(FLOW, steps, "sd3", shift=shift).levels.sigma, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_table_of_sd3(shift: float) -> None:
    case = load_case("sd3", f"flow_sigmas_shift{shift:.0f}")
    table = make_grid(FLOW, 1000, "linear", shift=shift).levels.sigma[:-1].flip(0)
    case.check("sigmas_1000", table, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_every_grid_descends_and_ends_at_the_data(spacing: str, steps: int) -> None:
    for schedule in (SD, make_schedule(ScheduleConfig(zero_terminal_snr=True)), FLOW, EDM):
        is_table, is_flow = schedule.config.kind == "ldm", schedule.config.kind == "flow"
        allowed = spacing in (*SNR_SPACINGS, "trailing") or (spacing in TABLE_SPACINGS if is_table else is_flow)
        if spacing in TABLE_SPACINGS and spacing != "trailing":
            allowed = is_table
        if spacing in ("linear", "sd3"):
            allowed = is_flow
        if not allowed:
            with pytest.raises(DarkroomError):
                make_grid(schedule, steps, spacing)
            continue
        if (spacing, steps) in (("leading", 1), ("ddim", 3)):
            continue  # begins at time 0; runs past the table, as the official one
        grid = make_grid(schedule, steps, spacing, final="clean")
        angle = torch.atan2(grid.levels.sigma, grid.levels.alpha)
        # The official `quad` grid repeats its lowest times.
        assert (angle.diff() <= 0).all() and (spacing == "quad" or (angle.diff() < 0).all())
        assert float(grid[-1].sigma) == 0 and float(grid[-1].alpha) == 1
        assert grid.steps >= steps and (spacing == "ddim" or grid.steps == steps)
        assert len(list(grid)) == len(grid) == grid.steps + 1
        assert grid.levels.alpha.dtype == torch.float64 and grid.levels.time.isfinite().all()


def test_first_ends_at_the_lowest_level() -> None:
    for schedule in (SD, EDM):
        grid = make_grid(schedule, 8, "karras", final="first")
        lowest = schedule.level(schedule.time_range[0])
        assert grid.steps == 8
        torch.testing.assert_close(grid[-1].sigma, lowest.sigma, rtol=1e-9, atol=0)
    assert float(make_grid(SD, 10, "ddim")[-1].time) == 0
    assert float(make_grid(SD, 10, "trailing", final="first")[-1].time) == 0


def test_karras_closed_form() -> None:
    """Karras et al. 2022, eq. 5, with rho = 3."""
    grid = make_grid(EDM, 6, "karras", rho=3.0, sigma_min=0.1, sigma_max=10.0)
    for i in range(6):
        expected = (10 ** (1 / 3) + i / 5 * (0.1 ** (1 / 3) - 10 ** (1 / 3))) ** 3
        assert float(grid[i].sigma) == pytest.approx(expected, rel=1e-12)


def test_level_at() -> None:
    for grid in (make_grid(SD, 10, "ddim"), make_grid(SD, 10, "karras"), make_grid(FLOW, 10, "linear")):
        previous = math.inf
        for position in torch.linspace(0, grid.steps, 41).tolist():
            level = grid.level_at(position)
            noise = math.atan2(float(level.sigma), float(level.alpha))
            assert noise < previous
            previous = noise
        assert grid.level_at(3.0).alpha == grid[3].alpha
        middle = grid.level_at(4.5).half_log_snr
        torch.testing.assert_close(middle, (grid[4].half_log_snr + grid[5].half_log_snr) / 2, rtol=1e-9, atol=1e-9)
        for outside in (-0.1, grid.steps + 0.1):
            with pytest.raises(ValueError):
                grid.level_at(outside)


def test_truncate() -> None:
    grid = make_grid(SD, 20, "ddim")
    rest = grid.truncate(5)
    assert rest.steps == 15 and rest[0].alpha == grid[5].alpha and rest[-1].alpha == grid[-1].alpha
    assert grid.truncate(20).steps == 0
    with pytest.raises(ValueError):
        grid.truncate(21)


def test_bad_requests_are_one_line() -> None:
    for schedule, steps, spacing in ((SD, 0, "ddim"), (SD, 10, "nonsense"), (SD, 1001, "trailing"), (FLOW, 10, "ddim")):
        with pytest.raises(DarkroomError) as error:
            make_grid(schedule, steps, spacing)
        assert "\n" not in str(error.value)
    with pytest.raises(DarkroomError):
        make_grid(SD, 10, "karras", sigma_min=2.0, sigma_max=1.0)


# ---- a shift that follows the size of latents


def test_shift_grows_with_the_root_of_the_places() -> None:
    """Esser et al. 2024, eq. 23: equal uncertainty at m places where n had s: shift sqrt(m/n), of what n had."""
    config = ScheduleConfig(kind="flow", shift=3.0, shift_rule="sqrt", shift_places=(4096, 16384))
    schedule = make_schedule(config)
    for side, shift in ((64, 3.0), (128, 6.0), (32, 1.5)):
        ours = make_grid(schedule, 10, "linear", places=side * side)
        assert torch.equal(ours.levels.sigma, make_grid(FLOW, 10, "linear", shift=shift).levels.sigma)
        official = make_grid(schedule, 10, "sd3", places=side * side)
        assert torch.equal(official.levels.sigma, make_grid(FLOW, 10, "sd3", shift=shift).levels.sigma)
    # Nobody says how large: that of the config.
    unknown = make_grid(schedule, 10, "linear").levels.sigma
    assert torch.equal(unknown, make_grid(FLOW, 10, "linear", shift=3.0).levels.sigma)
    # The paper's reason: a constant image seen through noise. (1-t) c + t n / sqrt(places) has one uncertainty.
    t = make_grid(FLOW, 10, "linear").levels.sigma[1:-1]
    shifted = make_grid(make_schedule(ScheduleConfig(kind="flow", shift_rule="sqrt")), 10, "linear", places=4096)
    moved = shifted.levels.sigma[1:-1]
    torch.testing.assert_close(moved / (1 - moved) / 4096**0.5, t / (1 - t) / 1024**0.5)


@pytest.mark.parametrize("tokens", [256, 1024, 1600, 4096])
def test_linear_shift_is_that_of_diffusers(tokens: int) -> None:
    """FLUX: mu is linear in the number of tokens, 0.5 at 256 and 1.15 at 4096; a token is 2x2 places."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = ScheduleConfig(kind="flow", shift=math.exp(0.5), shift_rule="linear", shift_end=math.exp(1.15))
    grid = make_grid(make_schedule(config), 12, "linear", places=4 * tokens)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    theirs.set_timesteps(sigmas=[1 - i / 12 for i in range(12)], mu=mu)
    torch.testing.assert_close(grid.levels.sigma, theirs.sigmas.double(), atol=1e-6, rtol=0)


def test_bad_shifts() -> None:
    for options in (
        {"shift_end": 0.0},
        {"shift_rule": "linear", "shift_places": (4096, 4096)},
        {"shift_rule": "sqrt", "shift_places": (0, 1)},
    ):
        with pytest.raises(DarkroomError, match="schedule shift_"):
            make_schedule(ScheduleConfig(kind="flow", **options))  # type: ignore[arg-type]
