"""`low_resolution`: a smaller or blurred picture made of the image, as a condition of super-resolution and deblurring.

Shapes: C channels, H W image size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.errors import DarkroomError


@dataclass(frozen=True)
class LowResolution:
    """factor: how many times smaller along each side (bicubic, antialiased); 1: only blurred
    blur:   standard deviation in pixels of a Gaussian that goes before
    """

    factor: int = 4
    blur: float = 0.0

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 <= self.blur < 100 or (self.factor == 1 and self.blur == 0):
            raise DarkroomError(
                f"data.low_resolution: factor {self.factor} and blur {self.blur:g} make nothing smaller or blurred; "
                "give a factor of 2 or more, or a blur above 0"
            )


def degrade(image: Tensor, rule: LowResolution) -> Tensor:
    """(C, H, W) of any type -> (C, ceil(H/factor), ceil(W/factor)) of that type, within the range of the image."""
    values = image.float()[None]
    low, high = values.min(), values.max()
    if rule.blur:
        values = blurred(values, rule.blur)
    if rule.factor > 1:
        size = [-(-side // rule.factor) for side in values.shape[2:]]
        values = F.interpolate(values, size=size, mode="bicubic", antialias=True).clamp(low, high)  # bicubic overshoots
    values = values[0] if image.dtype.is_floating_point else values[0].round()
    return values.to(image.dtype)


def blurred(values: Tensor, deviation: float) -> Tensor:
    """(B, C, H, W) under a Gaussian, cut at three deviations; beyond the border the picture is repeated."""
    radius = math.ceil(3 * deviation)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / deviation) ** 2)
    kernel /= kernel.sum()
    channels = values.shape[1]
    for axis in (2, 3):
        shape = [1, 1, 1, 1]
        shape[axis] = len(kernel)
        padding = [radius, radius, 0, 0] if axis == 3 else [0, 0, radius, radius]
        wide = F.pad(values, padding, mode="replicate")
        values = F.conv2d(wide, kernel.view(shape).expand(channels, 1, *shape[2:]), groups=channels)
    return values
