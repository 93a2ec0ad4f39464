"""DPM-Solver++: exponential integrators, exact in x and a polynomial in the logarithm of the noise for x0."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.solvers.common import Callback, Denoise, Noise, framed, step_towards


def dpm_plus_plus_2m(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    frame: Literal["edm", "flow"] = "edm",
    lower_order_final: bool = False,
) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), alg. 2: second-order multistep, one evaluation per step.
    x (B, ...) at grid[0] -> x at grid[-1].

    x' = (s'/s) x + (a' - a s'/s) D,  D = (1 + 1/(2r)) x0 - 1/(2r) x0_previous,  r = (l - l_previous) / (l' - l).
    l is the half log-SNR. First order (D = x0) in the first step and where l is infinite: after a start from pure
    noise, and on arriving at sigma = 0.
    frame: `flow` takes l = -log(sigma / (alpha + sigma)), finite at pure noise: what the official SD3 code does.
    lower_order_final: first order also for a last step to sigma > 0.
    """
    del noise
    previous: tuple[float, Tensor] | None = None
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0 = denoise(x, here)
        if callback is not None:
            callback(i, here, x, x0)
        now, following = (
            -math.log(s) if s > 0 else math.inf for _, s in (framed(p, frame == "flow") for p in (here, there))
        )
        extrapolated = x0
        last = lower_order_final and i == grid.steps - 1
        # `quad` grids may repeat a level: no slope can be taken across such a step.
        if previous is not None and math.isfinite(following) and now > previous[0] > -math.inf and not last:
            half_inverse_r = 0.5 * (following - now) / (now - previous[0])
            extrapolated = x0 + half_inverse_r * (x0 - previous[1])
        x = step_towards(x, extrapolated, here, there)
        previous = (now, x0)
    return x
