"""DPM-Solver++: exponential integrators in half log-SNR."""

from __future__ import annotations

import math

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.solvers.common import Callback, Denoise, Noise, step_towards


def dpm_plus_plus_2m(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), alg. 2: second-order multistep, one evaluation per step.
    x (B, ...) at grid[0] -> x at grid[-1].

    x' = (s'/s) x + (a' - a s'/s) D,  D = (1 + 1/(2r)) x0 - 1/(2r) x0_previous,  r = (l - l_previous) / (l' - l) with
    l the half log-SNR. First order (D = x0) at first and where l is infinite: after a start from pure noise, and
    on arriving at sigma = 0. lower_order_final: also for a last step to sigma > 0.
    """
    del noise
    previous: tuple[float, Tensor] | None = None
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        now, following = float(here.half_log_snr), float(there.half_log_snr)
        extrapolated = x0
        last = lower_order_final and i == grid.steps - 1
        if previous is not None and math.isfinite(following) and math.isfinite(previous[0]) and not last:
            half_inverse_r = 0.5 * (following - now) / (now - previous[0])
            extrapolated = x0 + half_inverse_r * (x0 - previous[1])
        x = step_towards(x, extrapolated, here, there)
        previous = (now, x0)
    return x
