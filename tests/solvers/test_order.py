"""Measured order of convergence of every deterministic solver on the Gaussian mixture, under VP, EDM and flow levels.

The reference is scipy's integrator of order 8 on the ODE, written here from the score and not from our step.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture, make_mixture
from scipy.integrate import solve_ivp
from torch import Tensor

from darkroom.diffusion.grids import Grid, grid_from_half_log_snr, make_grid
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.solvers import SOLVERS
from darkroom.solvers.adams import lagrange_integrals

NOMINAL: dict[str, float] = {
    "ddim": 1,
    "euler": 1,
    "heun": 2,
    "dpm++2m": 2,
    "dpm": 2,
    "deis": 2,
    "dpm2": 2,
    "dpm++3m": 2,
    "unipc": 2,
}
SCHEDULES = {
    "vp": ScheduleConfig(),
    "vp-cosine": ScheduleConfig(kind="cosine"),
    "edm": ScheduleConfig(kind="edm"),
    "flow": ScheduleConfig(kind="flow"),
}
SIGMA_MAX, SIGMA_MIN = 12.0, 0.08


def start(seed: int = 0) -> Tensor:
    return torch.randn(6, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@cache
def exact(sigma_max: float, sigma_min: float) -> Tensor:
    """The ODE dy/dr = -r score(y, r) of y = x/alpha over r = sigma/alpha (Karras et al. 2022, eq. 1), from r*noise."""
    mixture = make_mixture()
    edm = make_schedule(ScheduleConfig(kind="edm"))

    def slope(log_r: float, flat: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(flat).reshape(6, 2, 1, 1)
        score = mixture.score(y, edm.level_at_half_log_snr(-log_r))
        return (-math.exp(2 * log_r) * score).flatten().numpy()

    y = (sigma_max * start()).flatten().numpy()
    solution = solve_ivp(slope, (math.log(sigma_max), math.log(sigma_min)), y, method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1]).reshape(6, 2, 1, 1)


def measured_orders(name: str, mixture: GaussianMixture, grids: list[Grid], x: Tensor, target: Tensor) -> list[float]:
    """log2 of the ratio of errors of successive grids, each with twice the steps."""
    errors = [float((SOLVERS[name](mixture.x0, x, grid) - target).norm()) for grid in grids]
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize("levels", SCHEDULES)
@pytest.mark.parametrize("name", NOMINAL)
def test_order_between_finite_levels(name: str, levels: str, gaussian_mixture: GaussianMixture) -> None:
    schedule = make_schedule(SCHEDULES[levels])
    grids = [
        make_grid(schedule, n, "uniform_half_log_snr", final="first", sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
        for n in (60, 120, 240)
    ]
    first, last = grids[0][0], grids[0][-1]
    assert float(first.sigma / first.alpha) == pytest.approx(SIGMA_MAX)
    # The same point of the same ODE in every frame: x = alpha * (SIGMA_MAX * noise).
    x = float(first.alpha) * SIGMA_MAX * start()
    target = float(last.alpha) * exact(SIGMA_MAX, SIGMA_MIN)
    orders = measured_orders(name, gaussian_mixture, grids, x, target)
    assert orders[-1] == pytest.approx(NOMINAL[name], abs=0.15), orders


@pytest.mark.parametrize("levels", SCHEDULES)
@pytest.mark.parametrize("name,nominal", [("plms", 3), ("lms", 2)])
def test_order_of_adams_methods(name: str, nominal: int, levels: str, gaussian_mixture: GaussianMixture) -> None:
    """On even steps of sigma/alpha. The rules themselves are of order 4; their first step sets the limit: Euler's (LMS)
    or Heun's (PLMS), whose share of the error is small."""
    schedule = make_schedule(SCHEDULES[levels])
    ratios = [torch.linspace(2.0, 0.2, n + 1, dtype=torch.float64) for n in (200, 400, 800)]
    grids = [grid_from_half_log_snr(-r.log(), schedule) for r in ratios]
    x = float(grids[0][0].alpha) * exact(SIGMA_MAX, 2.0)
    target = float(grids[0][-1].alpha) * exact(SIGMA_MAX, 0.2)
    orders = measured_orders(name, gaussian_mixture, grids, x, target)
    assert nominal - 0.15 < orders[-1] < nominal + 0.8, orders


def test_lagrange_integrals_are_exact_for_their_polynomials() -> None:
    nodes = [1.0, 1.7, 2.1, 3.4]
    for count in range(1, 5):
        weights = lagrange_integrals(nodes[:count], 0.3)
        for power in range(count):
            integral = (0.3 ** (power + 1) - 1.0) / (power + 1)
            found = sum(w * node**power for w, node in zip(weights, nodes[:count], strict=True))
            assert found == pytest.approx(integral, rel=1e-12)


@cache
def exact_flow(last: float) -> Tensor:
    """dx/ds = noise - x0 of rectified flow, with noise = -s score, from pure noise at s = 1 to s = last."""
    mixture, flow = make_mixture(), make_schedule(ScheduleConfig(kind="flow"))

    def slope(s: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).reshape(6, 2, 1, 1)
        level = flow.level(1000.0 * s)
        return (-s * mixture.score(x, level) - mixture.x0(x, level)).flatten().numpy()

    solution = solve_ivp(slope, (1.0, last), start().flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1]).reshape(6, 2, 1, 1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["ddim", "euler", "heun"])
def test_order_from_pure_noise_to_the_data(name: str, shift: float, gaussian_mixture: GaussianMixture) -> None:
    """alpha = 0 at the start and sigma = 0 at the end, on the grid that flows use."""
    schedule = make_schedule(ScheduleConfig(kind="flow", shift=shift))
    grids = [make_grid(schedule, n, "linear") for n in (80, 160, 320)]
    assert float(grids[0][0].alpha) == 0 and float(grids[0][-1].sigma) == 0
    orders = measured_orders(name, gaussian_mixture, grids, start(), exact_flow(0.0))
    assert orders[-1] == pytest.approx(NOMINAL[name], abs=0.15), orders


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_plus_plus_2m_from_pure_noise_to_the_data(shift: float, gaussian_mixture: GaussianMixture) -> None:
    """Its variable is infinite at both ends, so that even steps of sigma give errors of h^2 log(1/h) there."""
    schedule = make_schedule(ScheduleConfig(kind="flow", shift=shift))
    steps = (320, 640, 1280)
    errors = [
        float(
            (
                SOLVERS["dpm++2m"](gaussian_mixture.x0, start(), make_grid(schedule, n, "linear")) - exact_flow(0.0)
            ).norm()
        )
        / math.log(n)
        for n in steps
    ]
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(2, abs=0.15)


def test_dpm_plus_plus_2m_in_the_flow_frame_from_pure_noise(gaussian_mixture: GaussianMixture) -> None:
    """With even steps of -log sigma, which is 0 at pure noise, nothing is lost."""
    schedule = make_schedule(ScheduleConfig(kind="flow"))
    last = 0.05
    errors = []
    for n in (60, 120, 240):
        s = torch.logspace(0, math.log10(last), n + 1, dtype=torch.float64)
        grid = Grid(schedule.level(1000 * s), schedule)
        out = SOLVERS["dpm++2m"](gaussian_mixture.x0, start(), grid, frame="flow")
        errors.append(float((out - exact_flow(last)).norm()))
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(2, abs=0.15), errors


@pytest.mark.parametrize("frame", ["edm", "flow"])
@pytest.mark.parametrize("levels", SCHEDULES)
def test_heun_in_both_frames(levels: str, frame: str, gaussian_mixture: GaussianMixture) -> None:
    schedule = make_schedule(SCHEDULES[levels])
    errors = []
    for n in (60, 120, 240):
        grid = make_grid(schedule, n, "uniform_half_log_snr", final="first", sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
        out = SOLVERS["heun"](gaussian_mixture.x0, float(grid[0].alpha) * SIGMA_MAX * start(), grid, frame=frame)
        errors.append(float((out - float(grid[-1].alpha) * exact(SIGMA_MAX, SIGMA_MIN)).norm()))
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(2, abs=0.15), errors


def test_closed_form_of_the_ode_on_one_gaussian() -> None:
    """Data N(m, s^2): the ODE keeps (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) constant. All solvers reach it."""
    m, s = 0.7, 0.5
    mixture = GaussianMixture(torch.ones(1).double(), torch.full((1, 2), m).double(), torch.tensor([s]).double())

    def scale(level: object) -> float:
        return math.hypot(float(level.alpha) * s, float(level.sigma))  # type: ignore[attr-defined]

    for config in SCHEDULES.values():
        schedule = make_schedule(config)
        for name, steps, bound in (
            ("ddim", 400, 1.6e-2),
            ("euler", 400, 1.6e-2),
            ("heun", 200, 5e-4),
            ("dpm++2m", 200, 5e-4),
        ):
            grid = make_grid(schedule, steps, "uniform_half_log_snr", final="first", sigma_min=0.01, sigma_max=50.0)
            here, there = grid[0], grid[-1]
            x = float(here.sigma) * start()
            expected = float(there.alpha) * m + scale(there) / scale(here) * (x - float(here.alpha) * m)
            ours = SOLVERS[name](mixture.x0, x, grid)
            assert float((ours - expected).abs().max()) < bound, (config.kind, name)
