"""Heun: Euler's step corrected with the derivative at its end; second order, two evaluations per step."""

from __future__ import annotations

import math

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.solvers.common import Callback, Denoise, Noise, churned, step_towards


def _correction(here: NoiseLevel, there: NoiseLevel, flow_frame: bool) -> float:
    """Factor c of x' = x_euler + c (x0' - x0).

    With y = x/k and S = sigma/k the derivative is dy/dS = (y - x0)/S both in the EDM frame (k = alpha) and in that of
    rectified flow (k = alpha + sigma). The trapezoidal rule for y, written in x, has c = k'/2 (S/S' - 1).
    """

    def frame(level: NoiseLevel) -> tuple[float, float]:
        k = float(level.alpha) + (float(level.sigma) if flow_frame else 0.0)
        return k, float(level.sigma) / k

    (_, s), (k_next, s_next) = frame(here), frame(there)
    return 0.5 * k_next * (s / s_next - 1)


def heun(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """Karras et al. 2022, alg. 2. x (B, ...) at grid[0] -> x at grid[-1]; the step to sigma = 0 is Euler's.

    The frame is EDM's, as in k-diffusion; for a grid whose first level has alpha + sigma = 1 (rectified flow, and pure
    noise, where x/alpha is infinite) it is that of rectified flow. churn*: see `euler`.
    """
    flow_frame = abs(float(grid[0].alpha) + float(grid[0].sigma) - 1) < 1e-9
    for i in range(grid.steps):
        x, here = churned(x, grid, i, noise, churn, churn_min, churn_max, churn_noise)
        there = grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        x = step_towards(x, x0, here, there)
        if float(there.sigma) > 0:
            x = x + _correction(here, there, flow_frame) * (denoise(x, there) - x0)
    return x
