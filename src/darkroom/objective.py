"""The training objective of a denoiser, pure given time and noise, and the bound on the likelihood that it comes from.

Shapes: B batch, C channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser, Prediction
from darkroom.diffusion.bound import (
    log_variance_between,
    mean_per_image,
    nll,
    normal_kl,
    posterior_mean,
    step_log_variances,
)
from darkroom.diffusion.grids import Grid
from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.diffusion.schedules import DDPMSchedule
from darkroom.diffusion.time_sampling import TimeSamplingConfig
from darkroom.diffusion.weighting import loss_weight
from darkroom.errors import DarkroomError


@dataclass(frozen=True)
class ObjectiveConfig(TimeSamplingConfig):
    """Which times are trained on (see `TimeSamplingConfig`) and how much each level counts (see `loss_weight`).

    loss_type: the error of the raw output: "l2" squared, or "l1" absolute (some models of the paper).

    Denoisers with a learned variance are trained on L_hybrid = L_simple + vlb_weight * L_vlb, in which L_vlb reaches
    the variance alone (Nichol & Dhariwal 2021, eq. 16); with `loss_weighting: vlb` on L_vlb itself.

    alone_rate: of models with several conditions, the share of examples that keep one of them alone, each as often as
        the others; the encoders' own drop rates decide for the rest. Without it a condition that is mostly seen in
        company is not learned: of three that are dropped half of the time, each is alone in an eighth.

    draws: how many times and noises every example of a batch is given. Conditions are encoded once for all of them,
        which pays where that costs much: a masked picture passes through the first stage anew in every step. In
        `clothing-inpaint` that is a third of the time with one draw, a fifth with two.

    likelihood_bins: L_vlb at time 0: so many values of a pixel in [-1, 1] (256 in the official code); null: a density,
        which is right for latents.
    """

    loss_type: Literal["l2", "l1"] = "l2"
    loss_weighting: Literal["uniform", "x0", "snr", "min_snr", "edm", "vlb"] = "uniform"
    min_snr_gamma: float = 5.0
    vlb_weight: float = 0.001
    alone_rate: float = 0.0
    draws: int = 1
    likelihood_bins: int | None = None

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise DarkroomError(f'"objective.draws" is {self.draws}: it must be at least 1')
        if not 0 <= self.alone_rate <= 1:
            raise DarkroomError(f'"objective.alone_rate" is {self.alone_rate:g}: give a share from 0 to 1')


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    noise: Tensor,
    level: NoiseLevel,
    conditioning: Conditioning | None,
    config: ObjectiveConfig,
) -> Tensor:
    """(B,): weight(level) * mean over C, H, W of (raw - target)^2, or of its absolute value; Rombach et al. 2022, eq.
    1-3. With a learned variance the bound is added, or is the loss; see `ObjectiveConfig`.

    x0, noise: (B, C, H, W) normalised latents and standard normal noise; level: (B,).
    """
    x = add_noise(x0, noise, level)
    prediction = denoiser.predict(x, level, conditioning)
    # One term of the bound stands for all of them: times their number it estimates their sum.
    count = denoiser.schedule.config.timesteps
    if denoiser.learned_variance and config.loss_weighting == "vlb":
        return count * bound_term(denoiser, prediction.x0, prediction, x0, x, level, config.likelihood_bins)
    target = denoiser.target(x0, noise, level).to(prediction.raw.dtype)
    difference = prediction.raw - target
    error = difference.abs() if config.loss_type == "l1" else difference.square()
    loss = _weighted(denoiser, mean_per_image(error), level, config)
    if denoiser.learned_variance:
        fixed = prediction.x0.detach()
        bound = bound_term(denoiser, fixed, prediction, x0, x, level, config.likelihood_bins)
        loss = loss + config.vlb_weight * count * bound
    return loss


def _weighted(denoiser: Denoiser, error: Tensor, level: NoiseLevel, config: ObjectiveConfig) -> Tensor:
    """error (B,) times the weight of its level."""
    previous: NoiseLevel | None = None
    if config.loss_weighting == "vlb" and isinstance(denoiser.schedule, DDPMSchedule):
        # The first term of the bound is a likelihood of the data, infinite as a squared error: it takes the
        # weight of the second, as in the official code.
        time = level.time.clamp(min=1)
        level, previous = denoiser.schedule.level(time), denoiser.schedule.level(time - 1)
    weight = loss_weight(
        config.loss_weighting,
        level,
        denoiser.prediction_type,
        min_snr_gamma=config.min_snr_gamma,
        sigma_data=denoiser.sigma_data,
        previous=previous,
    )
    return error * weight.to(device=error.device, dtype=error.dtype)


def bound_term(
    denoiser: Denoiser,
    estimate: Tensor,
    prediction: Prediction,
    x0: Tensor,
    x: Tensor,
    level: NoiseLevel,
    bins: int | None = None,
) -> Tensor:
    """(B,): one term of L_vlb in bits per dimension, with the learned variance; Nichol & Dhariwal 2021, eq. 4-7.

    Times 1, 2, ...: KL of the exact posterior q(x' | x, x0) from the reverse step whose mean has `estimate` for x0.
    Time 0: the likelihood of the data under that step; see `nll` for bins.
    """
    assert prediction.log_variance is not None
    there = denoiser.schedule.level(level.time - 1)
    least, _ = denoiser.table_log_variances(level)
    exact_log_variance = _like(least, x)
    step = normal_kl(
        posterior_mean(x, x0, level, there),
        exact_log_variance,
        posterior_mean(x, estimate, level, there),
        prediction.log_variance,
    )
    # At time 0 the mean of the step is the estimate itself.
    last = nll(x0, estimate, prediction.log_variance, bins)
    is_last = (level.time == 0).to(x.device)
    return torch.where(is_last, mean_per_image(last), mean_per_image(step)) / math.log(2)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """(B,) or () in the device and dtype of x, shaped to broadcast over its channels."""
    values = values.to(x)
    return values if values.ndim == 0 else values.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Bound:
    """An upper bound of -log2 p(x0) per dimension, (B,), and its parts: prior (what is left of x0 in the noisiest
    level), steps (B, N - 1) from the noisiest on, data (x0 given the least noisy level)."""

    prior: Tensor
    steps: Tensor
    data: Tensor

    @property
    def total(self) -> Tensor:
        return self.prior + self.steps.sum(1) + self.data


@torch.no_grad()
def bits_per_dimension(
    denoiser: Denoiser,
    x0: Tensor,
    grid: Grid,
    noise: Callable[[int], Tensor],
    conditioning: Conditioning | None = None,
    *,
    variance: Literal["beta", "beta_tilde", "learned"] = "beta",
    bins: int | None = None,
) -> Bound:
    """The variational bound of Ho et al. 2020, eq. 5, over the levels of a grid that ends at the data: any schedule,
    one network call per level. x0 (B, C, H, W); noise(i) (B, C, H, W) is drawn for level i.

    All 1000 levels of a table with `bins=256` on pixels in [-1, 1] are the bits/dim of the papers; fewer levels give a
    looser bound. On latents (bins None) it is a density: it can be compared between models of one first stage only.
    variance: of the reverse steps. The beta-tilde of the step to the data is 0: on a table it takes that of the step
    before, as in the official code, elsewhere, where levels may lie far apart, beta.
    """
    if grid.steps < 2 or float(grid[-1].sigma) > 0:
        raise DarkroomError("the bound needs a grid of at least two steps that ends at the data (final='clean')")
    if variance == "learned" and not denoiser.learned_variance:
        raise DarkroomError("this network has no learned variance; use 'beta' or 'beta_tilde'")

    def model_log_variance(prediction: Prediction, least: Tensor, most: Tensor) -> Tensor:
        if variance == "learned":
            assert prediction.variance_share is not None
            return log_variance_between(prediction.variance_share, least, most)
        return _like(most if variance == "beta" else least, x0)

    first = grid[0]
    at = first.like(x0)
    prior_log_variance = torch.tensor(2 * math.log(denoiser.schedule.prior_std(first)), dtype=x0.dtype)
    prior = mean_per_image(
        normal_kl(at.alpha * x0, 2 * torch.log(at.sigma), torch.zeros_like(x0), prior_log_variance.to(x0.device))
    )
    steps, least = [], torch.zeros(())
    for i in range(grid.steps):
        here, there = grid[i], grid[i + 1]
        x = add_noise(x0, noise(i).to(x0), here)
        prediction = denoiser.predict(x, here, conditioning)
        estimate = prediction.x0.to(x0)
        of_this, most = step_log_variances(here, there)
        if i < grid.steps - 1:
            least = of_this
            log_variance = model_log_variance(prediction, least, most)
            exact, ours = (posterior_mean(x, known, here, there) for known in (x0, estimate))
            steps.append(mean_per_image(normal_kl(exact, _like(least, x0), ours, log_variance)))
        else:
            least = least if isinstance(denoiser.schedule, DDPMSchedule) else most
            data = mean_per_image(nll(x0, estimate, model_log_variance(prediction, least, most), bins))
    return Bound(prior / math.log(2), torch.stack(steps, 1) / math.log(2), data / math.log(2))
