"""Consistency sampling: jump to the data, add fresh noise of the next level, jump again."""

from __future__ import annotations

import math

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.solvers.common import Callback, Denoise, Noise, draw


def lcm(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    time_scaling: float | None = None,
) -> Tensor:
    """Song et al. 2023 (consistency models), alg. 1: x' = alpha' x0 + sigma' z. x (B, ...) at grid[0] -> x at grid[-1].

    For models that answer with the data at once. time_scaling: latent consistency models (Luo et al. 2023, 10 in their
    code) mix x into the answer so that it is exact at time 0: x0 <- c_skip x + c_out x0 with
    c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2), u = time_scaling * time, d = 1/2.
    """
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        if time_scaling is not None:
            u = time_scaling * float(here.time)
            norm = u**2 + 0.25
            x0 = (0.25 / norm) * x + (u / math.sqrt(norm)) * x0
        x = float(there.alpha) * x0
        if float(there.sigma) > 0:
            x = x + float(there.sigma) * draw(noise, i, x)
    return x
