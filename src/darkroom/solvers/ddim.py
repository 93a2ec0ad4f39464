"""DDIM: the first-order step between any two levels, deterministic or with a share `eta` of fresh noise."""

from __future__ import annotations

import math

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.solvers.common import Callback, Denoise, Noise, draw, step_towards, transition_variance


def ddim(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Song et al. 2021 (DDIM), eq. 12 and 16, for any alpha and sigma. x (B, ...) at grid[0] -> x at grid[-1].

    x' = alpha' x0 + sqrt(sigma'^2 - g^2) noise_estimate + g z,  g^2 = eta^2 (sigma'^2/sigma^2) var(x | x').
    eta = 0 is the probability-flow ODE, eta = 1 the DDPM posterior (variance beta-tilde).
    """
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        sigma, sigma_next = float(here.sigma), float(there.sigma)
        fresh = eta * sigma_next / sigma * math.sqrt(transition_variance(here, there))
        if callback is not None:
            callback(i, here, x, x0)
        kept = math.sqrt(max(sigma_next**2 - fresh**2, 0.0))
        x = step_towards(x, x0, here, there, kept)
        if fresh > 0:
            x = x + fresh * draw(noise, i, x)
    return x
