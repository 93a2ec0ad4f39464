"""The training objective of a denoiser: pure, given time and noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.diffusion.schedules import DDPMSchedule
from darkroom.diffusion.time_sampling import TimeSamplingConfig
from darkroom.diffusion.weighting import loss_weight


@dataclass(frozen=True)
class ObjectiveConfig(TimeSamplingConfig):
    """Which times are trained on (see `TimeSamplingConfig`) and how much each level counts (see `loss_weight`)."""

    loss_weighting: Literal["uniform", "x0", "snr", "min_snr", "edm", "vlb"] = "uniform"
    min_snr_gamma: float = 5.0


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    noise: Tensor,
    level: NoiseLevel,
    conditioning: Conditioning | None,
    config: ObjectiveConfig,
) -> Tensor:
    """(B,): weight(level) * mean over C, H, W of (raw - target)^2; Rombach et al. 2022, eq. 1-3.

    x0, noise: (B, C, H, W) normalised latents and standard normal noise; level: (B,).
    """
    prediction = denoiser.predict(add_noise(x0, noise, level), level, conditioning)
    target = denoiser.target(x0, noise, level).to(prediction.raw.dtype)
    error = (prediction.raw - target).square().flatten(1).mean(1)
    at = level
    previous: NoiseLevel | None = None
    if config.loss_weighting == "vlb" and isinstance(denoiser.schedule, DDPMSchedule):
        # The first term of the bound is a likelihood of the data, infinite as a squared error: it takes the
        # weight of the second, as in the official code.
        time = level.time.clamp(min=1)
        at, previous = denoiser.schedule.level(time), denoiser.schedule.level(time - 1)
    weight = loss_weight(
        config.loss_weighting,
        at,
        denoiser.prediction_type,
        min_snr_gamma=config.min_snr_gamma,
        sigma_data=denoiser.sigma_data,
        previous=previous,
    )
    return error * weight.to(device=error.device, dtype=error.dtype)
