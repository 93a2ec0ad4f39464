"""Numerical methods that carry x from noise to data: stateless functions over a grid of levels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.schedules import EDMSchedule, FlowSchedule, NoiseSchedule
from darkroom.solvers.adams import lms, plms
from darkroom.solvers.common import ancestral
from darkroom.solvers.ddim import ddim
from darkroom.solvers.ddpm import ddpm
from darkroom.solvers.dpm import (
    deis,
    dpm,
    dpm_plus_plus_2m,
    dpm_plus_plus_2m_sde,
    dpm_plus_plus_3m,
    dpm_plus_plus_3m_sde,
)
from darkroom.solvers.dpm_singlestep import dpm2, dpm2_ancestral, dpm_plus_plus_2s_ancestral, dpm_plus_plus_sde
from darkroom.solvers.euler import euler, euler_ancestral
from darkroom.solvers.heun import heun
from darkroom.solvers.lcm import lcm
from darkroom.solvers.repaint import repaint, repaint_nfe
from darkroom.solvers.unipc import unipc

SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "lms": lms,
    "dpm": dpm,
    "deis": deis,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2_ancestral,
    "dpm++2s_ancestral": dpm_plus_plus_2s_ancestral,
    "dpm++sde": dpm_plus_plus_sde,
    "dpm++2m": dpm_plus_plus_2m,
    "dpm++2m_sde": dpm_plus_plus_2m_sde,
    "dpm++3m": dpm_plus_plus_3m,
    "dpm++3m_sde": dpm_plus_plus_3m_sde,
    "unipc": unipc,
    "lcm": lcm,
    "repaint": repaint,
}

# The solvers that spread their levels as EDM does, denser near the data; the others keep even times.
KARRAS = ("heun", "lms", "dpm2", "dpm2_ancestral", "dpm++2s_ancestral", "dpm++sde", "dpm++2m", "dpm++2m_sde", "dpm++3m",
          "dpm++3m_sde")  # fmt: skip
# The solvers that are polynomials in half log-SNR: on EDM levels they want even steps of it.
EXPONENTIAL = ("dpm", "deis", "dpm++2m", "dpm++2m_sde", "dpm++3m", "dpm++3m_sde", "unipc")

DEFAULT_SPACING: dict[str, str] = {name: "karras" if name in KARRAS else "trailing" for name in SOLVERS}


def default_spacing(solver: str, schedule: NoiseSchedule) -> str:
    """Where a solver's levels are placed unless one says otherwise.

    Flows have the shifted linear spacing. Tables that end in nearly pure noise (cosine, zero terminal SNR) keep even
    times: `karras` would spend most of its steps beyond sigma = 100 alpha, where x0 does not change. Polynomials in
    half log-SNR want even steps of it on EDM levels.
    """
    if isinstance(schedule, FlowSchedule):
        return "linear"
    if isinstance(schedule, EDMSchedule):
        return "exponential" if solver in EXPONENTIAL else "karras"
    if schedule.finite_half_log_snr_range[0] < -math.log(100):
        return "trailing"
    return DEFAULT_SPACING[solver]


def default_eta(solver: str) -> float | None:
    """The share of fresh noise per step that a solver takes by default; None if it has no such option."""
    option = inspect.signature(SOLVERS[solver]).parameters.get("eta")
    return None if option is None else float(option.default)


def solver_nfe(solver: str, grid: Grid, eta: float | None = None) -> int:
    """Calls of `denoise` that a run makes (guidance may run the network twice in each)."""
    pairs = [(grid[i], grid[i + 1]) for i in range(grid.steps)]
    if solver in ("heun", "dpm++sde"):
        return grid.steps + sum(float(there.sigma) > 0 for _, there in pairs)
    if solver in ("dpm2", "dpm2_ancestral", "dpm++2s_ancestral"):
        share = eta if eta is not None else default_eta(solver) or 0.0
        return grid.steps + sum(ancestral(here, there, share)[0] > 0 for here, there in pairs)
    if solver == "plms":
        first = next(((here, there) for here, there in pairs if float(here.alpha) > 0), None)
        return grid.steps + (first is not None and float(first[1].sigma) > 0)
    if solver == "repaint":
        return repaint_nfe(grid)
    return grid.steps
