"""DDPM: ancestral sampling from the posterior of one level given the noisier one."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.levels import NoiseLevel
from darkroom.errors import DarkroomError
from darkroom.solvers.common import Callback, Denoise, Noise, draw, transition_variance

# How far the variance is from beta-tilde to beta; that of `learned` is the network's.
MIXES = {"beta": 1.0, "beta_tilde": 0.0, "learned": 0.0}


def ddpm(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    callback: Callback | None = None,
    variance: Literal["beta", "beta_tilde", "learned"] | float = "beta_tilde",
) -> Tensor:
    """Ho et al. 2020, eq. 6-7 and alg. 2, between any two levels. x (B, ...) at grid[0] -> x at grid[-1].

    mean = (alpha_ts s'^2/s^2) x + (alpha' b / s^2) x0 with alpha_ts = alpha/alpha' and b = s^2 - alpha_ts^2 s'^2 (the
    table's beta). variance: `beta` b, `beta_tilde` b s'^2/s^2 (the posterior's own), or LDM's `v_posterior`: a number
    that mixes them, 0 being beta_tilde. `learned`: the network mixes their logarithms at each place (Nichol & Dhariwal
    2021, eq. 15): `denoise` then has a method `predict` that gives x0 and `variance_share`. No noise is added on
    arriving at sigma = 0.
    """
    if isinstance(variance, str) and variance not in MIXES:
        raise DarkroomError(
            f"unknown DDPM variance {variance!r}; choose beta, beta_tilde, learned or a number from 0 to 1"
        )
    mix = MIXES[variance] if isinstance(variance, str) else float(variance)
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x0, share = (denoise(x, here), None) if variance != "learned" else _with_share(denoise, x, here)
        if callback is not None:
            callback(i, here, x, x0)
        shrink = (float(there.sigma) / float(here.sigma)) ** 2
        beta = transition_variance(here, there)
        # alpha' = 0 happens only while both levels are pure noise: nothing is known of x0 yet and x stays.
        alpha_ts = float(here.alpha) / float(there.alpha) if float(there.alpha) > 0 else 1.0
        x = (alpha_ts * shrink) * x + (float(there.alpha) * beta / float(here.sigma) ** 2) * x0
        spread = (1 - mix) * beta * shrink + mix * beta
        if float(there.sigma) > 0 and spread > 0:
            # beta-tilde^(1 - share) beta^share, with beta-tilde = shrink * beta.
            deviation = (
                math.sqrt(spread) if share is None else torch.exp(0.5 * (1 - share) * math.log(shrink)) * beta**0.5
            )
            x = x + deviation * draw(noise, i, x)
    return x


def _with_share(denoise: Denoise, x: Tensor, here: NoiseLevel) -> tuple[Tensor, Tensor]:
    predict = getattr(denoise, "predict", None)
    prediction = None if predict is None else predict(x, here)
    if prediction is None or prediction.variance_share is None:
        raise DarkroomError(
            "DDPM variance 'learned' needs a network with a learned variance; choose beta or beta_tilde"
        )
    return prediction.x0, prediction.variance_share
