"""Euler: the first-order step of the probability-flow ODE, with optional churn, and its ancestral form."""

from __future__ import annotations

import math

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.solvers.common import Callback, Denoise, Noise, churned, step_towards
from darkroom.solvers.ddim import ddim


def euler(
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
    """Karras et al. 2022, alg. 2 without the correction. x (B, ...) at grid[0] -> x at grid[-1].

    In the frame x/alpha over sigma/alpha (EDM, and how k-diffusion treats VP models) and in that of rectified flow
    Euler's step is the same: `step_towards`. churn*: S_churn, S_tmin, S_tmax, S_noise of the paper, in sigma/alpha.
    """
    for i in range(grid.steps):
        x, here = churned(x, grid, i, noise, churn, churn_min, churn_max, churn_noise)
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        x = step_towards(x, x0, here, grid[i + 1])
    return x


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
) -> Tensor:
    """k-diffusion's ancestral Euler: a step down to less noise than the next level has, and fresh noise up to it.
    x (B, ...) at grid[0] -> x at grid[-1]. With `noise_scale` (S_noise) on the noise this is DDIM with this eta."""
    return ddim(denoise, x, grid, noise, callback=callback, eta=eta, noise_scale=noise_scale)
