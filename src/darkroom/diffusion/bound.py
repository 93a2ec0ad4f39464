"""The variational bound on the likelihood: what one step of the reverse process costs, in nats per dimension.

Shapes: B batch; x, x0, mean, log_variance (B, ...); levels () or (B,). Sources: Ho et al. 2020, eq. 5-7; Nichol &
Dhariwal 2021 (learned variance); Sohl-Dickstein et al. 2015.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from darkroom.diffusion.levels import NoiseLevel


def step_log_variances(here: NoiseLevel, there: NoiseLevel) -> tuple[Tensor, Tensor]:
    """(log beta-tilde, log beta) of the step from `here` to the cleaner `there`, each with the shape of the levels.

    beta = sigma^2 - (alpha/alpha')^2 sigma'^2 and beta-tilde = beta sigma'^2/sigma^2; Ho et al. 2020, eq. 7. They are
    the variances of the exact reverse step for standard normal and for constant data; beta-tilde is 0 on arriving at
    the data: log beta-tilde = -inf.
    """
    # exp(2 (l - l')) = (alpha/alpha')^2 (sigma'/sigma)^2: no difference of two large numbers.
    beta = here.sigma**2 * -torch.expm1(2 * (here.half_log_snr - there.half_log_snr))
    return torch.log(beta * (there.sigma / here.sigma) ** 2), torch.log(beta)


def log_variance_between(share: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """share * log beta + (1 - share) * log beta-tilde; Nichol & Dhariwal 2021, eq. 15. share (B, ...), bounds (B,)."""
    least, most = (t.to(share).view(-1, *[1] * (share.ndim - 1)) for t in (least, most))
    return least + share * (most - least)


def posterior_mean(x: Tensor, x0: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """Mean of q(x' | x, x0): (alpha/alpha') (sigma'/sigma)^2 x + alpha' (beta/sigma^2) x0; Ho et al. 2020, eq. 7."""
    here, there = here.like(x), there.like(x)
    shrink = (there.sigma / here.sigma) ** 2
    ratio = here.alpha / there.alpha
    return ratio * shrink * x + there.alpha * (1 - ratio**2 * shrink) * x0


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) || N(other...)) per entry, all broadcastable."""
    difference = log_variance - other_log_variance
    return 0.5 * (torch.expm1(difference) - difference + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log N(x; mean, e^log_variance) per entry: a density, which may be negative."""
    return 0.5 * (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * torch.exp(-log_variance))


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor, bins: int = 256) -> Tensor:
    """-log of the mass of N(mean, e^log_variance) in the bin of x, per entry; x has `bins` even values in [-1, 1], the
    two last of which take the tails. Ho et al. 2020, eq. 13."""
    scale = torch.exp(-0.5 * log_variance)
    half = 1 / (bins - 1)
    above, below = scale * (x + half - mean), scale * (x - half - mean)
    # Mirrored into the left tail, where float32 can still tell two values of the normal distribution apart.
    flip = (above + below) > 0
    high, low = torch.where(flip, -below, above), torch.where(flip, -above, below)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    # log(e^a - e^b); the bound keeps bins of no width finite, as the official 1e-12 does.
    inside = log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-12)))
    first, last = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    result = torch.where(x < -1 + half, first, torch.where(x > 1 - half, last, inside))
    return -result.clamp(min=math.log(1e-12))


def nll(x: Tensor, mean: Tensor, log_variance: Tensor, bins: int | None) -> Tensor:
    """-log p(x) per entry: of a density, or of one of `bins` values."""
    if bins is None:
        return gaussian_nll(x, mean, log_variance)
    return discretised_gaussian_nll(x, mean, log_variance, bins)


def mean_per_image(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return values.flatten(1).mean(1)
