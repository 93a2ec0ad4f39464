"""`Guided`: a denoiser with conditioning and classifier-free guidance bound: the (x, level) -> x0 that solvers see."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.levels import NoiseLevel
from darkroom.errors import DarkroomError


def combine(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """(B, ...): uncond + scale*(cond - uncond); Ho & Salimans 2022, eq. 6 with scale = 1 + w.

    rescale: share in which the result gets the per-image standard deviation of `cond`; Lin et al. 2024, eq. 15-16.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    # An image that is constant has no deviation to keep: the tiny bound leaves it as it is instead of dividing by 0.
    factor = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-12)
    return guided * (rescale * factor + (1 - rescale))


class Guided:
    """(x, level) -> x0 with guidance on the raw outputs.

    null: the conditioning that is guided away from: the conditioner's null, or a negative prompt. Without it, or with
        scale 1, the network runs once per level; otherwise on a doubled batch, unconditional half first.
    interval: (low, high) of sigma/alpha inside which guidance acts; outside the scale is 1 (Kynkaanniemi et al. 2024).
    rescale: see `combine`.
    nfe: network evaluations per image so far.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioning: Conditioning | None,
        null: Conditioning | None = None,
        scale: float = 1.0,
        *,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ) -> None:
        if interval is not None and not interval[0] < interval[1]:
            raise DarkroomError(f"guidance interval {interval} is empty; give it as (low, high) of sigma")
        if not 0 <= rescale <= 1:
            raise DarkroomError(f"guidance rescale is {rescale}; it must be between 0 and 1")
        self.denoiser = denoiser
        self.conditioning = conditioning
        self.null = null
        self.scale = float(scale)
        self.interval = interval
        self.rescale = rescale
        self.nfe = 0

    def _active(self, level: NoiseLevel) -> bool:
        if self.null is None or self.scale == 1:
            return False
        if self.interval is None:
            return True
        low, high = self.interval
        # Multiplied out, so that alpha = 0 is a level like any other.
        alpha, sigma = float(level.alpha), float(level.sigma)
        return low * alpha < sigma <= high * alpha

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """x (B, C, H, W) at a scalar level -> x0 (B, C, H, W)."""
        if not self._active(level):
            self.nfe += 1
            return self.denoiser.predict(x, level, self.conditioning).x0
        if self.scale == 0:
            self.nfe += 1
            return self.denoiser.predict(x, level, self.null).x0
        self.nfe += 2
        conditioning = self.conditioning if self.conditioning is not None else Conditioning()
        assert self.null is not None
        if _joinable(conditioning, self.null):
            both = Conditioning.cat([self.null, conditioning])
            raw = self.denoiser.predict(torch.cat([x, x]), level, both).raw
            unconditional, conditional = raw.chunk(2)
        else:
            unconditional = self.denoiser.predict(x, level, self.null).raw
            conditional = self.denoiser.predict(x, level, conditioning).raw
        guided = combine(conditional, unconditional, self.scale, self.rescale)
        return self.denoiser.x0_from_raw(guided, x, level)


def _joinable(one: Conditioning, other: Conditioning) -> bool:
    """Whether both fill the same slots with the same shapes: prompts of another length run on their own."""
    for f in fields(Conditioning):
        a, b = getattr(one, f.name), getattr(other, f.name)
        if (a is None) != (b is None) or (a is not None and a.shape != b.shape):
            return False
    return True
