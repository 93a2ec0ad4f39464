"""Noise on a condition, and its level told to the network: a model of several stages then forgives what the one before
did (Ho et al. 2022, arXiv 2106.15282, "conditioning augmentation").

Shapes: B batch, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.diffusion.levels import add_noise
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError

LEVELS = 1000
# As in the x4 upscaler of SD 2.
IMAGE_NOISE = ScheduleConfig(kind="ldm", timesteps=LEVELS, beta_start=1e-4, beta_end=0.02)
# As in unCLIP of SD 2.1.
EMBEDDING_NOISE = ScheduleConfig(kind="cosine", timesteps=LEVELS)


@dataclass(frozen=True)
class Noised:
    """Values of a batch with noise of some level: values (B, ...), level (B,) integers."""

    values: Tensor
    level: Tensor

    def __len__(self) -> int:
        return len(self.level)


def with_noise(values: Tensor, level: Tensor, noise: Tensor, schedule: ScheduleConfig) -> Noised:
    """alpha*values + sigma*noise at `level` (B,) of the schedule, as in the forward process of diffusion."""
    return Noised(add_noise(values, noise.to(values), make_schedule(schedule).level(level)), level)


def draw_noise(values: Tensor, highest: int, generator: torch.Generator, schedule: ScheduleConfig) -> Noised:
    """Noise of a level drawn evenly from 0 to highest - 1 for each example."""
    level = torch.randint(highest, (len(values),), generator=generator)
    return with_noise(values, level, torch.randn(values.shape, generator=generator), schedule)


def check_level(level: int, highest: int) -> int:
    if not 0 <= level < highest:
        raise DarkroomError(f"noise level {level} is outside what this model was trained with, 0 to {highest - 1}")
    return level


def level_embedding(level: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): [cos, sin] of level * 10000^(-2i/width), the time embedding of DDPM in the official order."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=level.device))
    angles = level.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)
