"""Inference grids: the levels that a solver visits. N steps are N + 1 levels, from noise to data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.schedules import DDPMSchedule, FlowSchedule, NoiseSchedule, shifted
from darkroom.errors import DarkroomError

TABLE_SPACINGS = ("ddim", "quad", "trailing", "leading", "linspace", "lcm")
LCM_TIMES = 50  # the times that latent consistency models are distilled at
SNR_SPACINGS = ("karras", "exponential", "uniform_half_log_snr")
FLOW_SPACINGS = ("linear", "sd3")
SPACINGS = (*TABLE_SPACINGS, *SNR_SPACINGS, *FLOW_SPACINGS)


@dataclass(frozen=True)
class Grid:
    """levels: alpha, sigma and time, each (N+1,) float64 on the CPU, from noise to data."""

    levels: NoiseLevel
    schedule: NoiseSchedule

    @property
    def steps(self) -> int:
        return int(self.levels.alpha.shape[0]) - 1

    def __len__(self) -> int:
        """Number of levels: steps + 1."""
        return self.steps + 1

    def __getitem__(self, index: int) -> NoiseLevel:
        """The scalar level at a grid point; negative indices count from the clean end."""
        return NoiseLevel(self.levels.alpha[index], self.levels.sigma[index], self.levels.time[index])

    def __iter__(self) -> Iterator[NoiseLevel]:
        return (self[i] for i in range(len(self)))

    def level_at(self, position: float) -> NoiseLevel:
        """The level at a position in [0, N]: half log-SNR is interpolated, or the angle where that is infinite."""
        if not 0 <= position <= self.steps:
            raise ValueError(f"grid position {position} is outside 0..{self.steps}")
        below = min(int(position), self.steps - 1)
        weight = position - below
        if weight in (0.0, 1.0):
            return self[below + int(weight)]
        return level_between(self.schedule, self[below], self[below + 1], weight)

    def truncate(self, start: int) -> Grid:
        """The grid from its `start`-th level on, for image-to-image: steps - start steps remain."""
        if not 0 <= start <= self.steps:
            raise ValueError(f"cannot start at level {start} of a grid with {self.steps} steps")
        kept = NoiseLevel(self.levels.alpha[start:], self.levels.sigma[start:], self.levels.time[start:])
        return Grid(kept, self.schedule)


def level_between(schedule: NoiseSchedule, here: NoiseLevel, there: NoiseLevel, weight: float) -> NoiseLevel:
    """A level between two others: half log-SNR is interpolated, or the angle where that is infinite."""
    low, high = here.half_log_snr, there.half_log_snr
    if low.isfinite() and high.isfinite():
        return schedule.level_at_half_log_snr(torch.lerp(low, high, weight))
    angle = torch.lerp(torch.atan2(here.sigma, here.alpha), torch.atan2(there.sigma, there.alpha), weight)
    return schedule.level_at_half_log_snr(-torch.log(torch.tan(angle)))


def stack_levels(levels: list[NoiseLevel]) -> NoiseLevel:
    """Scalar levels to one level of shape (N+1,)."""
    return NoiseLevel(
        torch.stack([level.alpha for level in levels]),
        torch.stack([level.sigma for level in levels]),
        torch.stack([level.time for level in levels]),
    )


def grid_from_levels(levels: list[NoiseLevel], schedule: NoiseSchedule) -> Grid:
    """A grid from levels chosen by the caller, noisiest first."""
    return Grid(stack_levels(levels), schedule)


def grid_from_half_log_snr(values: Tensor, schedule: NoiseSchedule, *, append_clean: bool = False) -> Grid:
    """A grid from half log-SNR values (N+1,) in ascending order, also between the entries of a table."""
    levels = [schedule.level_at_half_log_snr(value) for value in values]
    return grid_from_levels([*levels, schedule.clean()] if append_clean else levels, schedule)


def _table_times(spacing: str, timesteps: int, steps: int) -> Tensor:
    """Descending times of a DDPM table, (N,)."""
    if spacing == "ddim":
        # LDM's `make_ddim_timesteps`: steps that do not divide T give more points than asked for.
        times = torch.arange(0, timesteps, timesteps // steps).flip(0) + 1
    elif spacing == "quad":
        root = torch.linspace(0, (timesteps * 0.8) ** 0.5, steps, dtype=torch.float64)
        times = (root**2).long().flip(0) + 1
    elif spacing == "trailing":
        times = torch.tensor([round(timesteps - i * timesteps / steps) - 1 for i in range(steps)])
    elif spacing == "leading":
        times = torch.arange(0, steps).flip(0) * (timesteps // steps)
    elif spacing == "lcm":
        if steps > LCM_TIMES:
            raise DarkroomError(f"grid spacing 'lcm' has {LCM_TIMES} times; ask for at most so many steps")
        times = (LCM_TIMES - torch.arange(steps) * LCM_TIMES // steps) * (timesteps // LCM_TIMES) - 1
    else:
        times = torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64)
    return times.to(torch.float64)


def make_grid(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "ddim",
    *,
    final: Literal["clean", "first"] | None = None,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shift: float | None = None,
    places: int | None = None,
) -> Grid:
    """Choose the levels of a run.

    spacing: DDPM tables: `ddim` (LDM's `range(0, T, T // S) + 1`, more than S steps where S does not divide T), `quad`,
        `trailing` (begins at T-1; Lin et al. 2024), `leading`, `linspace`, `lcm` (of 50 even times; Luo et al. 2023);
        flow: `linear` in sigma, shifted; `sd3` as the official SD3 code, whose end points are shifted twice;
        any schedule: `trailing`, `karras` (Karras et al. 2022, eq. 5), `exponential` = `uniform_half_log_snr`.
    final: `clean` ends at sigma = 0, `first` at the lowest level of the schedule (LDM's last `alphas_prev`,
        alphas_cumprod[0]; for `karras` and the like: sigma_min). Default: `first` for `ddim` and `quad`, else `clean`.
    rho, sigma_min, sigma_max: of the spacings in SNR; sigma stands for sigma/alpha.
    shift: replaces the shift of a flow schedule. places: h*w of the latents, for one that follows their size.
    """
    if spacing not in SPACINGS:
        raise DarkroomError(f"unknown grid spacing {spacing!r}; choose one of {', '.join(SPACINGS)}")
    if steps < 1:
        raise DarkroomError(f"cannot solve in {steps} steps; ask for at least 1")
    if final is None:
        final = "first" if spacing in ("ddim", "quad") else "clean"
    if spacing == "trailing" and not isinstance(schedule, DDPMSchedule):
        # The same idea without a table: even steps of time from its end, then the data.
        spacing = "linear" if isinstance(schedule, FlowSchedule) else "exponential"
    if spacing in SNR_SPACINGS:
        return _snr_grid(schedule, steps, spacing, final, rho, sigma_min, sigma_max)
    if spacing in FLOW_SPACINGS:
        if not isinstance(schedule, FlowSchedule):
            raise DarkroomError(f"grid spacing {spacing!r} belongs to flow schedules; use 'trailing' or 'karras' here")
        return _flow_grid(schedule, steps, spacing, schedule.shift_at(places) if shift is None else shift)
    if not isinstance(schedule, DDPMSchedule):
        other = "linear" if isinstance(schedule, FlowSchedule) else "karras"
        raise DarkroomError(f"grid spacing {spacing!r} belongs to DDPM tables; use {other!r} with this schedule")
    timesteps = schedule.config.timesteps
    if steps > timesteps:
        raise DarkroomError(f"{steps} steps are more than the schedule's {timesteps}; ask for at most {timesteps}")
    # `linspace` reaches time 0 by itself: with `first` that is its last level.
    times = _table_times(spacing, timesteps, steps + 1 if spacing == "linspace" and final == "first" else steps)
    if times[0] > timesteps - 1:
        raise DarkroomError(
            f"{steps} steps with spacing {spacing!r} run past the schedule's {timesteps} times; use spacing 'trailing'"
        )
    if final == "clean":
        times = torch.cat([times, torch.full((1,), -1.0, dtype=torch.float64)])
    elif times[-1] > 0:
        times = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    elif spacing != "linspace":
        raise DarkroomError(f"grid spacing {spacing!r} already ends at the lowest level; use final='clean'")
    return Grid(schedule.level(times), schedule)


def _flow_grid(schedule: FlowSchedule, steps: int, spacing: str, shift: float) -> Grid:
    if spacing == "linear":
        s = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    else:
        lowest = shifted(torch.tensor(1 / schedule.config.timesteps, dtype=torch.float64), shift)
        s = shifted(1 + (lowest - 1) * torch.linspace(0, 1, steps, dtype=torch.float64), shift)
        s = torch.cat([s, torch.zeros(1, dtype=torch.float64)])
    return Grid(schedule.level(s * schedule.config.timesteps), schedule)


def _snr_grid(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str,
    final: str,
    rho: float,
    sigma_min: float | None,
    sigma_max: float | None,
) -> Grid:
    lowest, highest = schedule.finite_half_log_snr_range
    if sigma_max is not None:
        lowest = -float(torch.log(torch.tensor(sigma_max, dtype=torch.float64)))
    if sigma_min is not None:
        highest = -float(torch.log(torch.tensor(sigma_min, dtype=torch.float64)))
    if not lowest < highest:
        raise DarkroomError(f"grid sigma_min {sigma_min} must be below sigma_max {sigma_max}")
    count = steps if final == "clean" else steps + 1
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    if spacing == "karras":
        ends = torch.exp(torch.tensor([-lowest, -highest], dtype=torch.float64) / rho)
        values = -rho * torch.log(ends[0] + ramp * (ends[1] - ends[0]))
    else:
        values = lowest + ramp * (highest - lowest)
    return grid_from_half_log_snr(values, schedule, append_clean=final == "clean")
