"""`Denoiser`: a network, its schedule and what it predicts, seen as one function (x, level, conditioning) -> x0.

It is the only class that knows a prediction type; solvers, guidance and losses see x0.
Shapes: B batch, C channels, H W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from darkroom.conditioning.types import Conditioning
from darkroom.diffusion.bound import log_variance_between, step_log_variances
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.prediction import (
    PREDICTION_TYPES,
    TARGETS,
    X0_FROM_RAW,
    edm_scalings,
    edm_target,
    x0_from_edm,
)
from darkroom.diffusion.schedules import DDPMSchedule, NoiseSchedule, ScheduleConfig
from darkroom.errors import DarkroomError
from darkroom.networks.kinds import AnyNetworkConfig
from darkroom.networks.unet import UNetConfig


@dataclass(frozen=True)
class DenoiserConfig:
    """Everything a denoiser is built from.

    network: its `kind` is "unet" (the default), "dit" or "mmdit"; each has its own sizes and options
    schedule: how much noise there is at which time
    prediction_type: what the network says
    sigma_data: standard deviation of x0 that `edm` assumes; null: the schedule's own
    learned_variance: the network also says how uncertain each step is, in a second half of its output channels
        (`learn_sigma` of the official code; Nichol & Dhariwal 2021)
    """

    network: AnyNetworkConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction_type: Literal["epsilon", "x0", "v", "velocity", "edm"] = "epsilon"
    sigma_data: float | None = None
    learned_variance: bool = False


@dataclass(frozen=True)
class Prediction:
    """raw: what the network said; x0: the clean estimate it means; both (B, C, H, W).
    variance_share: for networks with a learned variance, where the logarithm of a reverse step's variance lies
    between beta-tilde (0) and beta (1), whatever the step. log_variance: of the step to the table's next level."""

    raw: Tensor
    x0: Tensor
    log_variance: Tensor | None = None
    variance_share: Tensor | None = None


def _working(x: Tensor) -> Tensor:
    """Conversions divide by small numbers: half precision is widened, float64 is kept."""
    return x if x.dtype == torch.float64 else x.float()


class Denoiser(nn.Module):
    """The preconditioned network.

    network(x (B, C, H, W), time (B,), conditioning) -> raw (B, C, H, W); with `edm` it is given c_in*x.
    `time` is level.time: 0..T-1 for DDPM tables, T*sigma for flows, log(sigma)/4 (c_noise) for EDM. Where the level has
    a target_time the network is given it as a fourth argument; see the option target_time of each network.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        sigma_data: float | None = None,
        learned_variance: bool = False,
    ) -> None:
        """sigma_data: for `edm`; taken from the schedule's config unless given. learned_variance: the network gives
        (B, 2C, H, W), of which the second half is about the variance."""
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise DarkroomError(
                f"unknown prediction type {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}"
            )
        if prediction_type == "epsilon" and float(schedule.level(schedule.time_range[1]).alpha) == 0:
            raise DarkroomError(
                "prediction type 'epsilon' is undefined on a schedule that ends in pure noise (zero terminal SNR, "
                "flow); use 'v', 'velocity' or 'x0'"
            )
        if learned_variance and not isinstance(schedule, DDPMSchedule):
            raise DarkroomError(
                f'"denoiser.learned_variance" is about the steps of a DDPM table; '
                f"schedule {schedule.config.kind!r} has none: remove it"
            )
        self.network = network
        self.schedule = schedule
        self.learned_variance = learned_variance
        self.prediction_type = prediction_type
        self.sigma_data = schedule.config.sigma_data if sigma_data is None else sigma_data

    def forward(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning | None = None) -> Tensor:
        """(B, C, H, W) -> the clean estimate x0 (B, C, H, W)."""
        return self.predict(x, level, conditioning).x0

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning | None = None) -> Prediction:
        """The raw output (in float32) and the clean estimate."""
        x = _working(x)
        network_input = x
        if self.prediction_type == "edm":
            network_input = edm_scalings(level.like(x), self.sigma_data)[2] * x
        # The time is cast before it is moved: some devices have no float64.
        target = None if level.target_time is None else level.target_time.to(x.dtype)
        at = replace(level, time=level.time.to(x.dtype), target_time=target).like(x)
        conditioning = None if conditioning is None else conditioning.spread(*x.shape[2:])
        parameter = next(self.network.parameters(), None)
        if parameter is not None and parameter.dtype != x.dtype:
            network_input = network_input.to(parameter.dtype)
            conditioning = None if conditioning is None else conditioning.to(dtype=parameter.dtype)
        targets = () if at.target_time is None else (at.target_time,)
        raw = self.network(network_input, at.time, conditioning, *targets).to(x.dtype)
        if not self.learned_variance:
            return Prediction(raw, self.x0_from_raw(raw, x, level))
        raw, variance = raw.chunk(2, dim=1)
        # Between -1 and 1 in the official code, without a bound.
        share = (variance + 1) / 2
        log_variance = log_variance_between(share, *self.table_log_variances(level))
        return Prediction(raw, self.x0_from_raw(raw, x, level), log_variance, share)

    def table_log_variances(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """(log beta-tilde, log beta) of the step from a level to the table's next, each (B,). The step to the data,
        whose beta-tilde is 0, takes that of the step before (`posterior_log_variance_clipped`)."""
        schedule, time = self.schedule, level.time
        _, most = step_log_variances(level, schedule.level(time - 1))
        time = time.clamp(min=1)
        least, _ = step_log_variances(schedule.level(time), schedule.level(time - 1))
        return least, most

    def x0_from_raw(self, raw: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
        """The clean estimate that a raw output means at x; guidance combines raw outputs and converts once."""
        x, raw = _working(x), _working(raw)
        if self.prediction_type == "edm":
            return x0_from_edm(x, raw, level, self.sigma_data)
        return X0_FROM_RAW[self.prediction_type](x, raw, level)

    def target(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The raw output that would be exactly right, (B, C, H, W)."""
        if self.prediction_type == "edm":
            return edm_target(x0, noise, level, self.sigma_data)
        return TARGETS[self.prediction_type](x0, noise, level)
