"""What all solvers share: their types and the one exact step.

Shapes: x, x0 (B, ...); levels are scalars, so their numbers are Python floats in float64 and x keeps its own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.levels import NoiseLevel

Denoise = Callable[[Tensor, NoiseLevel], Tensor]
"""(x, level) -> x0."""

Noise = Callable[[int], Tensor]
"""i-th random draw of each image, standard normal with the shape of x."""

Callback = Callable[[int, NoiseLevel, Tensor, Tensor], None]
"""Called once per step with (solver_step, level, x at that level, x0 estimate there)."""


class Solver(Protocol):
    """solver(denoise, x, grid, noise, *, callback, **options): x at grid[0] -> x at grid[-1]."""

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise | None = None, *, callback: Callback | None = None
    ) -> Tensor: ...


def step_towards(x: Tensor, x0: Tensor, here: NoiseLevel, there: NoiseLevel, sigma_next: float | None = None) -> Tensor:
    """x' = (s'/s) x + (a' - a s'/s) x0: move to `there` with the noise estimate of x and x0; exact if x0 were constant.

    Finite at alpha = 0 (start) and at s' = 0 (end). `sigma_next` replaces s' where fresh noise will fill the rest.
    """
    ratio = (float(there.sigma) if sigma_next is None else sigma_next) / float(here.sigma)
    return ratio * x + (float(there.alpha) - float(here.alpha) * ratio) * x0


def in_flow_frame(grid: Grid, frame: Literal["edm", "flow"] | None) -> bool:
    """Which frame Heun's method works in, unless `frame` says it.

    With y = x/k and S = sigma/k the ODE is dy/dS = (y - x0)/S both in the EDM frame, k = alpha, and in that of
    rectified flow, k = alpha + sigma. EDM's is what k-diffusion and diffusers use for VP and EDM levels. Near pure
    noise its S is huge or infinite while x0 hardly changes: grids of rectified flow (alpha + sigma = 1) and VP grids
    that begin at sigma > 100 alpha (cosine, zero terminal SNR) take the other.
    """
    if frame is not None:
        return frame == "flow"
    alpha, sigma = float(grid[0].alpha), float(grid[0].sigma)
    return abs(alpha + sigma - 1) < 1e-9 or (alpha < 1 and sigma > 100 * alpha)


def framed(level: NoiseLevel, flow_frame: bool, sigma: float | None = None) -> tuple[float, float]:
    """(k, S = sigma/k) of a level; see `in_flow_frame`. `sigma` replaces the level's own."""
    alpha, sigma = float(level.alpha), float(level.sigma) if sigma is None else sigma
    k = alpha + sigma if flow_frame else alpha
    return k, sigma / k if k > 0 else math.inf


def transition_variance(here: NoiseLevel, there: NoiseLevel) -> float:
    """var(x at `here` | x at the cleaner `there`) = sigma^2 - (alpha/alpha')^2 sigma'^2; Kingma et al. 2021, eq. 20.

    The general form of the table's beta = 1 - alphas_cumprod / alphas_cumprod_prev.
    """
    alpha_next = float(there.alpha)
    if alpha_next == 0:
        return 0.0
    ratio = float(here.alpha) / alpha_next
    return max(float(here.sigma) ** 2 - (ratio * float(there.sigma)) ** 2, 0.0)


def ancestral(here: NoiseLevel, there: NoiseLevel, eta: float) -> tuple[float, float]:
    """(kept, fresh) with kept^2 + fresh^2 = sigma'^2: how much of the noise at `there` comes from the present estimate
    and how much is drawn anew. fresh^2 = eta^2 (sigma'^2/sigma^2) var(x | x'); Song et al. 2021 (DDIM), eq. 16.

    eta = 0: nothing is drawn; eta = 1: the posterior of DDPM. In sigma/alpha these are `sigma_down` and `sigma_up` of
    k-diffusion's ancestral solvers.
    """
    sigma_next = float(there.sigma)
    fresh = eta * sigma_next / float(here.sigma) * math.sqrt(transition_variance(here, there))
    fresh = min(fresh, sigma_next)
    return math.sqrt(max(sigma_next**2 - fresh**2, 0.0)), fresh


def draw(noise: Noise | None, i: int, x: Tensor) -> Tensor:
    """The i-th draw in the device and dtype of x."""
    if noise is None:
        raise ValueError("this solver draws noise with these options: pass `noise`")
    return noise(i).to(x)


def refreshed(x: Tensor, amount: float, noise: Noise | None, i: int) -> Tensor:
    """x (B, ...) + amount * (the i-th draw); `noise` may be absent where the amount is 0."""
    return x + amount * draw(noise, i, x) if amount > 0 else x


def churned(
    x: Tensor,
    grid: Grid,
    i: int,
    noise: Noise | None,
    churn: float,
    churn_min: float,
    churn_max: float,
    churn_noise: float,
) -> tuple[Tensor, NoiseLevel]:
    """x raised to a noisier level before step i, and that level; Karras et al. 2022, alg. 2, lines 4-6.

    r = sigma/alpha grows by 1 + min(S_churn/N, sqrt(2) - 1) where S_tmin <= r <= S_tmax. Pure noise cannot grow.
    """
    here = grid[i]
    alpha, sigma = float(here.alpha), float(here.sigma)
    if churn <= 0 or alpha == 0 or not churn_min <= sigma / alpha <= churn_max:
        return x, here
    growth = 1 + min(churn / grid.steps, math.sqrt(2) - 1)
    raised = grid.schedule.level_at_half_log_snr(here.half_log_snr - math.log(growth))
    # A table ends: the ratio is taken from the level that was found.
    alpha_raised = float(raised.alpha)
    added = (float(raised.sigma) / alpha_raised) ** 2 - (sigma / alpha) ** 2
    if added <= 0:
        return x, here
    fresh = alpha_raised * math.sqrt(added) * churn_noise
    return (alpha_raised / alpha) * x + fresh * draw(noise, i, x), raised
