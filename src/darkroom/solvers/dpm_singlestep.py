"""Second-order methods with an evaluation inside each step: DPM-2, DPM++ 2S, DPM++ SDE, plain and ancestral.

The inner level lies between the two ends in half log-SNR. An ancestral step first goes down to (alpha', kept) and then
adds `fresh` noise; see `common.ancestral`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from darkroom.diffusion.grids import Grid, level_between
from darkroom.diffusion.levels import NoiseLevel
from darkroom.solvers.common import Callback, Denoise, Noise, ancestral, framed, in_flow_frame, refreshed, step_towards


def _lowered(there: NoiseLevel, kept: float) -> NoiseLevel:
    """`there` with less noise: where an ancestral step arrives before it adds some. It has no time of its own."""
    return replace(there, sigma=torch.as_tensor(kept, dtype=torch.float64))


def dpm2_ancestral(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    frame: Literal["edm", "flow"] | None = None,
) -> Tensor:
    """k-diffusion's DPM-2 with ancestral noise: the midpoint rule, after Lu et al. 2022 (DPM-Solver-2).
    x (B, ...) at grid[0] -> x at grid[-1]; a step that keeps no noise is Euler's.

    y' = y + (S' - S) dy/dS at the inner level, y = x/k; frame: see `in_flow_frame`.
    """
    flow_frame = in_flow_frame(grid, frame)
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        kept, fresh = ancestral(here, there, eta)
        if kept > 0:
            inner = level_between(grid.schedule, here, _lowered(there, kept), 0.5)
            x_inner = step_towards(x, x0, here, inner)
            x0_inner = denoise(x_inner, inner)
            (k, s), (k_inner, s_inner), (k_next, s_next) = (
                framed(here, flow_frame), framed(inner, flow_frame), framed(there, flow_frame, kept)
            )  # fmt: skip
            slope = (x_inner / k_inner - x0_inner) / s_inner
            x = k_next * (x / k + (s_next - s) * slope)
        else:
            x = step_towards(x, x0, here, there, kept)
        x = refreshed(x, noise_scale * fresh, noise, i)
    return x


def dpm2(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    frame: Literal["edm", "flow"] | None = None,
) -> Tensor:
    """The midpoint rule of the ODE: `dpm2_ancestral` with eta = 0."""
    return dpm2_ancestral(denoise, x, grid, noise, callback=callback, eta=0.0, frame=frame)


def dpm_plus_plus_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), alg. 1 with r = 1/2: the step is taken with the x0 of its middle.
    x (B, ...) at grid[0] -> x at grid[-1]; a step that keeps no noise is of first order. eta = 0 is the ODE solver."""
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        kept, fresh = ancestral(here, there, eta)
        if kept > 0:
            inner = level_between(grid.schedule, here, _lowered(there, kept), 0.5)
            x0 = denoise(step_towards(x, x0, here, inner), inner)
        x = step_towards(x, x0, here, there, kept)
        x = refreshed(x, noise_scale * fresh, noise, i)
    return x


def dpm_plus_plus_sde(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """k-diffusion's DPM++ SDE: as DPM++ 2S, with fresh noise on the way to the inner level too (draws 2i and 2i + 1).
    x (B, ...) at grid[0] -> x at grid[-1]; the step to sigma = 0 is of first order. r: where the inner level lies."""
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        kept, fresh = ancestral(here, there, eta)
        if float(there.sigma) > 0:
            inner = level_between(grid.schedule, here, there, r)
            kept_inner, fresh_inner = ancestral(here, inner, eta)
            x_inner = step_towards(x, x0, here, inner, kept_inner)
            x_inner = refreshed(x_inner, noise_scale * fresh_inner, noise, 2 * i)
            x0 = torch.lerp(x0, denoise(x_inner, inner), 1 / (2 * r))
        x = step_towards(x, x0, here, there, kept)
        x = refreshed(x, noise_scale * fresh, noise, 2 * i + 1)
    return x
