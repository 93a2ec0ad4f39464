"""Ancestral steps that are taken back and made again, by which kept and repainted parts come to agree."""

from __future__ import annotations

import math

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.solvers.common import (
    Callback,
    Denoise,
    Noise,
    ancestral,
    draw,
    refreshed,
    step_towards,
    transition_variance,
)


def repaint(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    resample: int = 4,
) -> Tensor:
    """Lugmayr et al. 2022 (RePaint), alg. 1 with jumps of one step. x (B, ...) at grid[0] -> x at grid[-1].

    Every step is that of the DDPM posterior. All but the last of `resample` times the forward process then leads back,
    x = (a/a') x' + sqrt(var(x | x')) z. Steps to the data, and those between levels of pure noise, are made once.
    """
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        kept, fresh = ancestral(here, there, 1.0)
        times = _times(there, resample)
        for again in range(times):
            x0 = denoise(x, here)
            if callback is not None and again == times - 1:
                callback(i, here, x, x0)
            number = 2 * (i * resample + again)
            following = refreshed(step_towards(x, x0, here, there, kept), fresh, noise, number)
            if again < times - 1:
                back = float(here.alpha) / float(there.alpha)
                deviation = math.sqrt(transition_variance(here, there))
                x = back * following + deviation * draw(noise, number + 1, x)
        x = following
    return x


def _times(there: NoiseLevel, resample: int) -> int:
    return resample if float(there.sigma) > 0 and float(there.alpha) > 0 else 1


def repaint_nfe(grid: Grid, resample: int = 4) -> int:
    """Calls of `denoise`."""
    return sum(_times(grid[i + 1], resample) for i in range(grid.steps))
