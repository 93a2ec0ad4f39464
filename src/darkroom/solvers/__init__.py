"""Numerical methods that carry x from noise to data: stateless functions over a grid of levels."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.schedules import EDMSchedule, FlowSchedule, NoiseSchedule
from darkroom.solvers.ddim import ddim
from darkroom.solvers.ddpm import ddpm
from darkroom.solvers.dpm import dpm_plus_plus_2m
from darkroom.solvers.euler import euler
from darkroom.solvers.heun import heun

SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "heun": heun,
    "dpm++2m": dpm_plus_plus_2m,
}

DEFAULT_SPACING: dict[str, str] = {
    "ddim": "trailing",
    "ddpm": "trailing",
    "euler": "trailing",
    "heun": "karras",
    "dpm++2m": "karras",
}


def default_spacing(solver: str, schedule: NoiseSchedule) -> str:
    """Where a solver's levels are placed unless one says otherwise.

    Flows have the shifted linear spacing. Tables that end in nearly pure noise (cosine, zero terminal SNR) keep even
    times: `karras` would spend most of its steps beyond sigma = 100 alpha, where x0 does not change. DPM++ 2M wants
    even steps of half log-SNR on EDM levels.
    """
    if isinstance(schedule, FlowSchedule):
        return "linear"
    if isinstance(schedule, EDMSchedule):
        return "exponential" if solver == "dpm++2m" else "karras"
    if schedule.finite_half_log_snr_range[0] < -math.log(100):
        return "trailing"
    return DEFAULT_SPACING[solver]


def solver_nfe(solver: str, grid: Grid) -> int:
    """Calls of `denoise` that a run makes (guidance may run the network twice in each)."""
    if solver != "heun":
        return grid.steps
    return 2 * grid.steps - (1 if float(grid[-1].sigma) == 0 else 0)
