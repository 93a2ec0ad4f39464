"""AdamW with warm-up, and the learning-rate curves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from darkroom.errors import DarkroomError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and what is done to its rate and gradients."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.01  # of the learning rate at the end of a cosine decay
    gradient_clip: float | None = 1.0
    ema_decay: float | None = 0.999

    def __post_init__(self) -> None:
        def check(name: str, value: float, valid: bool, rule: str) -> None:
            if not valid or not math.isfinite(value):
                raise DarkroomError(f'"optimizer.{name}" is {value}: it must be {rule}')

        check("learning_rate", self.learning_rate, self.learning_rate > 0, "a number above 0")
        for beta in self.betas:
            check("betas", beta, 0 <= beta < 1, "two numbers from 0 to below 1")
        check("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        check("final_fraction", self.final_fraction, 0 <= self.final_fraction <= 1, "a share from 0 to 1")
        if (clip := self.gradient_clip) is not None:
            check("gradient_clip", clip, clip > 0, "above 0, or null for none")
        if (decay := self.ema_decay) is not None:
            check("ema_decay", decay, 0 <= decay < 1, "a number from 0 to below 1, or null for no averages")


def learning_rate(config: OptimizerConfig, train_step: int, steps: int) -> float:
    """The rate of optimisation step `train_step` (0-based) out of `steps`: linear warm-up, then constant or cosine."""
    warm = min(1.0, (train_step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    if config.decay == "constant":
        return config.learning_rate * warm
    progress = min(1.0, max(0.0, (train_step - config.warmup_steps) / max(1, steps - config.warmup_steps)))
    low = config.final_fraction
    return config.learning_rate * warm * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay applies to matrices and convolutions only, not to gains, biases and single vectors."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    assert sum(len(g["params"]) for g in groups) == len(parameters)  # type: ignore[misc,arg-type]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
