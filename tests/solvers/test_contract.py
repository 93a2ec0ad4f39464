"""What every solver promises: finite in float32 at both ends, the dtype of x, stateless, counted, repeatable."""

from __future__ import annotations

import pytest
import torch
from gaussian_mixture import GaussianMixture
from torch import Tensor

from darkroom.diffusion.grids import Grid, make_grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.schedules import NoiseSchedule, ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError
from darkroom.solvers import DEFAULT_SPACING, SOLVERS, ddim, default_spacing, solver_nfe

SCHEDULES: dict[str, NoiseSchedule] = {
    "ldm": make_schedule(ScheduleConfig()),
    "cosine": make_schedule(ScheduleConfig(kind="cosine")),
    "zero-terminal-snr": make_schedule(ScheduleConfig(zero_terminal_snr=True)),
    "flow": make_schedule(ScheduleConfig(kind="flow", shift=3.0)),
    "edm": make_schedule(ScheduleConfig(kind="edm")),
}
OPTIONS: dict[str, list[dict[str, object]]] = {
    "ddim": [{}, {"eta": 0.5}, {"eta": 1.0}],
    "ddpm": [{}, {"variance": "beta"}, {"variance": 0.5}],
    "euler": [{}, {"churn": 20.0}],
    "heun": [{}, {"churn": 20.0}],
    "plms": [{}],
    "euler_ancestral": [{}, {"eta": 0.5, "noise_scale": 0.9}],
    "lms": [{}, {"order": 2}, {"frame": "flow"}],
    "dpm": [{}, {"order": 3}],
    "deis": [{}, {"lower_order_final": True}],
    "dpm2": [{}, {"frame": "flow"}],
    "dpm2_ancestral": [{}, {"eta": 0.5}],
    "dpm++2s_ancestral": [{}, {"eta": 0.0}],
    "dpm++sde": [{}, {"r": 0.4}],
    "dpm++2m": [{}, {"lower_order_final": True}, {"correction": "heun"}],
    "dpm++2m_sde": [{}, {"correction": "heun"}],
    "dpm++3m": [{}],
    "dpm++3m_sde": [{}, {"eta": 0.5}],
    "unipc": [{}, {"variant": "bh1"}, {"order": 3}],
    "lcm": [{}],
    "repaint": [{}, {"resample": 1}],
}
RUNS = [(name, options) for name in SOLVERS for options in OPTIONS[name]]


def draws(i: int) -> Tensor:
    return torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(100 + i))


def spacings(schedule: NoiseSchedule) -> list[str]:
    return ["trailing", "karras"] + (["ddim", "quad", "linspace"] if schedule.variance_preserving else [])


@pytest.mark.parametrize("levels", SCHEDULES)
@pytest.mark.parametrize(
    "name,options", RUNS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_finite_in_float32(name: str, options: dict, levels: str, gaussian_mixture: GaussianMixture) -> None:
    schedule = SCHEDULES[levels]
    for spacing in spacings(schedule):
        for steps in (1, 2, 4, 25):
            grid = make_grid(schedule, steps, spacing)
            x = draws(0) * schedule.prior_std(grid[0])
            out = SOLVERS[name](gaussian_mixture.x0, x, grid, draws, **options)
            assert out.dtype == torch.float32 and out.shape == x.shape
            assert out.isfinite().all(), (spacing, steps)
            # Few steps may be far off, but 25 land on the data, which lie within 3 of the origin.
            assert steps < 25 or float(out.abs().max()) < 4, (spacing, steps)


@pytest.mark.parametrize("name", SOLVERS)
def test_calls_and_callback(name: str, gaussian_mixture: GaussianMixture) -> None:
    for levels, final in (("ldm", "clean"), ("ldm", "first"), ("flow", "clean")):
        schedule = SCHEDULES[levels]
        grid = make_grid(schedule, 7, default_spacing(name, schedule), final=final)
        calls: list[float] = []
        seen: list[int] = []

        def denoise(x: Tensor, level: NoiseLevel, calls: list[float] = calls) -> Tensor:
            calls.append(float(level.time))
            return gaussian_mixture.x0(x, level)

        def callback(step: int, level: NoiseLevel, x: Tensor, x0: Tensor, seen: list[int] = seen) -> None:
            torch.testing.assert_close(x0, gaussian_mixture.x0(x, level))
            seen.append(step)

        SOLVERS[name](denoise, draws(0), grid, draws, callback=callback)
        assert len(calls) == solver_nfe(name, grid) and seen == list(range(7))


@pytest.mark.parametrize(
    "name,options", RUNS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_stateless_and_independent_of_the_batch(name: str, options: dict, gaussian_mixture: GaussianMixture) -> None:
    grid = make_grid(SCHEDULES["ldm"], 6, "trailing")
    x = draws(0).double()
    before = x.clone()
    run = lambda x, noise: SOLVERS[name](gaussian_mixture.x0, x, grid, noise, **options)  # noqa: E731
    all_of_them = run(x, draws)
    assert torch.equal(x, before), "the input was changed"
    assert torch.equal(all_of_them, run(x, draws))
    torch.testing.assert_close(run(x[2:3], lambda i: draws(i)[2:3]), all_of_them[2:3], rtol=1e-12, atol=1e-12)
    assert all_of_them.dtype == torch.float64


def test_an_empty_grid_changes_nothing() -> None:
    grid = make_grid(SCHEDULES["ldm"], 6, "trailing").truncate(6)
    for solver in SOLVERS.values():
        assert torch.equal(solver(lambda x, level: x * 0, draws(0), grid, draws), draws(0))


def test_tables_agree() -> None:
    assert set(SOLVERS) == set(DEFAULT_SPACING) == set(OPTIONS)
    for name in SOLVERS:
        for schedule in SCHEDULES.values():
            assert isinstance(make_grid(schedule, 5, default_spacing(name, schedule)), Grid)
            assert isinstance(make_grid(schedule, 5, DEFAULT_SPACING[name]), Grid)


def test_bad_options() -> None:
    grid = make_grid(SCHEDULES["ldm"], 6, "trailing")
    with pytest.raises(DarkroomError):
        SOLVERS["ddpm"](lambda x, level: x, draws(0), grid, draws, variance="gamma")
    with pytest.raises(ValueError, match="noise"):
        ddim(lambda x, level: x, draws(0), grid, eta=1.0)
