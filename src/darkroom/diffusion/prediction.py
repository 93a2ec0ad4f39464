"""What a network may output, and the way from each output to the clean estimate x0 and back.

All functions are pure and assume x = alpha*x0 + sigma*noise. Shapes: x, x0, noise, raw (B, ...); levels () or (B,).
They hold for any pair (alpha, sigma), variance-preserving or not, and stay finite at alpha = 0 (except from `epsilon`,
which carries no information about x0 there) and at sigma = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from darkroom.diffusion.levels import NoiseLevel

PREDICTION_TYPES = ("epsilon", "x0", "v", "velocity", "edm")


def x0_from_epsilon(x: Tensor, epsilon: Tensor, level: NoiseLevel) -> Tensor:
    """x0 = (x - sigma*epsilon) / alpha; Ho et al. 2020, eq. 15. Undefined at alpha = 0."""
    at = level.like(x)
    return (x - at.sigma * epsilon) / at.alpha


def epsilon_from_x0(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """epsilon = (x - alpha*x0) / sigma; 0 at sigma = 0, where the noise leaves no trace in x."""
    at = level.like(x)
    safe = torch.where(at.sigma > 0, at.sigma, torch.ones_like(at.sigma))
    return torch.where(at.sigma > 0, (x - at.alpha * x0) / safe, torch.zeros_like(x))


def x0_from_v(x: Tensor, v: Tensor, level: NoiseLevel) -> Tensor:
    """x0 = (alpha*x - sigma*v) / (alpha^2 + sigma^2); Salimans & Ho 2022, App. D, where the denominator is 1."""
    at = level.like(x)
    return (at.alpha * x - at.sigma * v) / (at.alpha**2 + at.sigma**2)


def epsilon_from_v(x: Tensor, v: Tensor, level: NoiseLevel) -> Tensor:
    """epsilon = (sigma*x + alpha*v) / (alpha^2 + sigma^2); the companion of `x0_from_v`."""
    at = level.like(x)
    return (at.sigma * x + at.alpha * v) / (at.alpha**2 + at.sigma**2)


def v_target(x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """v = alpha*noise - sigma*x0; Salimans & Ho 2022, App. D."""
    at = level.like(x0)
    return at.alpha * noise - at.sigma * x0


def x0_from_velocity(x: Tensor, velocity: Tensor, level: NoiseLevel) -> Tensor:
    """x0 = (x - sigma*velocity) / (alpha + sigma); Liu et al. 2023 (rectified flow), where alpha + sigma = 1."""
    at = level.like(x)
    return (x - at.sigma * velocity) / (at.alpha + at.sigma)


def velocity_target(x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """velocity = noise - x0, at every level; Liu et al. 2023, eq. 1 with time growing towards noise."""
    del level
    return noise - x0


def epsilon_target(x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """epsilon = noise, at every level; Ho et al. 2020, eq. 14."""
    del x0, level
    return noise


def x0_target(x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """x0 itself, at every level."""
    del noise, level
    return x0


def edm_scalings(level: NoiseLevel, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise, each with the shape of the level; Karras et al. 2022, table 1.

    The paper has alpha = 1; here for any alpha, with d = alpha^2 sigma_data^2 + sigma^2 the variance of x:
    c_skip = alpha sigma_data^2 / d, c_out = sigma sigma_data / sqrt(d), c_in = 1 / sqrt(d),
    c_noise = log(sigma / alpha) / 4 (infinite at the two ends of a schedule).
    """
    variance = (level.alpha * sigma_data) ** 2 + level.sigma**2
    c_skip = level.alpha * sigma_data**2 / variance
    c_out = level.sigma * sigma_data / variance.sqrt()
    return c_skip, c_out, variance.rsqrt(), -level.half_log_snr / 4


def x0_from_edm(x: Tensor, raw: Tensor, level: NoiseLevel, sigma_data: float) -> Tensor:
    """x0 = c_skip*x + c_out*raw; Karras et al. 2022, eq. 7."""
    c_skip, c_out, _, _ = edm_scalings(level.like(x), sigma_data)
    return c_skip * x + c_out * raw


def edm_target(x0: Tensor, noise: Tensor, level: NoiseLevel, sigma_data: float) -> Tensor:
    """(x0 - c_skip*x) / c_out; Karras et al. 2022, eq. 8, with x inserted so that nothing is divided by sigma:
    (sigma*x0 - alpha sigma_data^2 noise) / (sigma_data sqrt(alpha^2 sigma_data^2 + sigma^2))."""
    at = level.like(x0)
    variance = (at.alpha * sigma_data) ** 2 + at.sigma**2
    return (at.sigma * x0 - at.alpha * sigma_data**2 * noise) / (sigma_data * variance.sqrt())


X0_FROM_RAW: dict[str, Callable[[Tensor, Tensor, NoiseLevel], Tensor]] = {
    "epsilon": x0_from_epsilon,
    "x0": lambda x, raw, level: raw,
    "v": x0_from_v,
    "velocity": x0_from_velocity,
}
TARGETS: dict[str, Callable[[Tensor, Tensor, NoiseLevel], Tensor]] = {
    "epsilon": epsilon_target,
    "x0": x0_target,
    "v": v_target,
    "velocity": velocity_target,
}
