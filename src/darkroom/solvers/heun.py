"""Heun: Euler's step corrected with the derivative at its end; second order, two evaluations per step."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.solvers.common import Callback, Denoise, Noise, churned, framed, in_flow_frame, step_towards


def heun(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    frame: Literal["edm", "flow"] | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """Karras et al. 2022, alg. 2. x (B, ...) at grid[0] -> x at grid[-1]; the step to sigma = 0 is Euler's.

    x' = x_euler + c (x0' - x0) with x0' the estimate at x_euler: the trapezoidal rule for dy/dS = (y - x0)/S has
    c = k'/2 (S/S' - 1). frame: see `in_flow_frame`. churn*: see `euler`.
    """
    flow_frame = in_flow_frame(grid, frame)
    for i in range(grid.steps):
        x, here = churned(x, grid, i, noise, churn, churn_min, churn_max, churn_noise)
        there = grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        x = step_towards(x, x0, here, there)
        if float(there.sigma) > 0:
            _, s = framed(here, flow_frame)
            k_next, s_next = framed(there, flow_frame)
            x = x + 0.5 * k_next * (s / s_next - 1) * (denoise(x, there) - x0)
    return x
