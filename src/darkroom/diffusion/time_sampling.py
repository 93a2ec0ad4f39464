"""Which times a denoiser is trained on: one uniform draw per example through the quantile function of the choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darkroom.diffusion.schedules import DDPMSchedule, FlowSchedule, NoiseSchedule, shifted
from darkroom.errors import DarkroomError

TIME_SAMPLINGS = ("uniform", "uniform_continuous", "logit_normal", "edm")


@dataclass(frozen=True)
class TimeSamplingConfig:
    """time_sampling: `uniform` over the table's integers (Ho et al. 2020) or the time range of a continuous schedule;
        `uniform_continuous` also between a table's integers; `logit_normal` sigmoid of a normal over the range (Esser
        et al. 2024, eq. 19); `edm` log(sigma/alpha) normal (Karras et al. 2022, table 1).
    time_mean, time_std: of the normal; None means 0 and 1 for `logit_normal`, -1.2 and 1.2 for `edm`.
    stratified: spread the draws of a batch evenly (Kingma et al. 2021, App. I.1): less noise in the loss.
    """

    time_sampling: Literal["uniform", "uniform_continuous", "logit_normal", "edm"] = "uniform"
    time_mean: float | None = None
    time_std: float | None = None
    stratified: bool = False


def sample_time(
    config: TimeSamplingConfig,
    schedule: NoiseSchedule,
    batch: int,
    generator: torch.Generator,
    places: int | None = None,
) -> Tensor:
    """(batch,) float64 times on the CPU, drawn with `generator`; a flow's shift applies to all but `edm`.
    places: h*w of the latents, for a shift that follows their size."""
    kind = config.time_sampling
    if kind not in TIME_SAMPLINGS:
        raise DarkroomError(f"unknown time sampling {kind!r}; choose one of {', '.join(TIME_SAMPLINGS)}")
    if config.stratified:
        offset = torch.rand(1, generator=generator, device=generator.device, dtype=torch.float64).cpu()
        u = (offset + torch.arange(batch, dtype=torch.float64) / batch) % 1.0
    else:
        u = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    low, high = schedule.time_range
    if kind == "uniform" and isinstance(schedule, DDPMSchedule):
        return (u * schedule.config.timesteps).floor()
    if kind in ("uniform", "uniform_continuous"):
        s = u
    else:
        # The quantile of 0 is -inf; rand may return it.
        z = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        default_mean, default_std = (0.0, 1.0) if kind == "logit_normal" else (-1.2, 1.2)
        mean = default_mean if config.time_mean is None else config.time_mean
        std = default_std if config.time_std is None else config.time_std
        if kind == "edm":
            return schedule.time_at_half_log_snr(-(mean + std * z)).clamp(low, high)
        s = torch.sigmoid(mean + std * z)
    if isinstance(schedule, FlowSchedule):
        s = shifted(s, schedule.shift_at(places))
    return low + (high - low) * s
