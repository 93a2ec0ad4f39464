"""DDIM: the first-order step between any two levels, deterministic or with a share `eta` of fresh noise."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.solvers.common import Callback, Denoise, Noise, ancestral, refreshed, step_towards


def ddim(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    eta: float = 0.0,
    noise_scale: float = 1.0,
    refine: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Song et al. 2021 (DDIM), eq. 12 and 16, for any alpha and sigma. x (B, ...) at grid[0] -> x at grid[-1].

    x' = alpha' x0 + sqrt(sigma'^2 - g^2) noise_estimate + g z,  g^2 = eta^2 (sigma'^2/sigma^2) var(x | x').
    eta = 0 is the probability-flow ODE, eta = 1 the DDPM posterior (variance beta-tilde). noise_scale: a factor on z,
    the "temperature" of the official code. refine: x0 -> a better x0 that the step goes to, while its noise is
    that of the plain x0; the official `quantize_x0`, with the codebook of a VQ first stage.
    """
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        refined = x0 if refine is None else refine(x0)
        if callback is not None:
            callback(i, here, x, refined)
        kept, fresh = ancestral(here, there, eta)
        x = step_towards(x, x0, here, there, kept)
        if refine is not None:
            x = x + float(there.alpha) * (refined - x0)
        x = refreshed(x, noise_scale * fresh, noise, i)
    return x
