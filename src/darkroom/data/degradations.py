"""`low_resolution`: a smaller, blurred or damaged picture made of the image, as a condition of super-resolution,
deblurring and blind restoration.

Shapes: C channels, H W image size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.data.blind_degradation import STRENGTHS, degrade_blindly
from darkroom.data.resizing import bicubic
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat

BLUR_LIMIT = 100


@dataclass(frozen=True)
class LowResolution:
    """factor:   how many times smaller along each side; 1: of the image's size
    blur:     standard deviation in pixels of a Gaussian that goes before; [least, greatest]: drawn for each picture
    pipeline: "bicubic": blurred as said and made smaller by antialiased bicubic (see `data.resizing`); "bsr" and
        "bsr-light": blur, resizing, noise and JPEG at random (see `data.blind_degradation`), for pictures of unknown
        history
    """

    factor: int = 4
    blur: float | tuple[float, float] = 0.0
    pipeline: Literal["bicubic", "bsr", "bsr-light"] = "bicubic"

    def __post_init__(self) -> None:
        low, high = self.blur_range
        if self.factor < 1 or not 0 <= low <= high < BLUR_LIMIT:
            raise DarkroomError(
                f"data.low_resolution: factor {self.factor}, blur {self.blur}; give a factor of 1 or more, and a blur "
                f"from 0 to below {BLUR_LIMIT} or [least, greatest]"
            )
        if self.pipeline != "bicubic" and high:
            raise DarkroomError(f"data.low_resolution: {self.pipeline} draws its own blur; leave `blur` out")
        if self.pipeline == "bicubic" and self.factor == 1 and high == 0:
            raise DarkroomError(
                "data.low_resolution: factor 1 and blur 0 make nothing smaller or blurred; give a factor of 2 or more, "
                "or a blur above 0"
            )

    @property
    def blur_range(self) -> tuple[float, float]:
        return self.blur if isinstance(self.blur, tuple) else (self.blur, self.blur)

    @property
    def is_random(self) -> bool:
        """Whether two draws for one picture differ."""
        return self.pipeline != "bicubic" or self.blur_range[0] < self.blur_range[1]

    def check(self, channels: int) -> None:
        """Raises DarkroomError for pictures that it cannot be applied to."""
        if self.pipeline != "bicubic" and channels not in (1, 3):
            raise DarkroomError(
                f"data.low_resolution: {self.pipeline} includes JPEG, which has 1 or 3 channels, and data.channels is "
                f"{channels}; use pipeline: bicubic"
            )


def degrade(
    image: Tensor, rule: LowResolution, rng: np.random.Generator | None = None, pixels: PixelFormat | None = None
) -> Tensor:
    """(C, H, W) of any type -> (C, ceil(H/factor), ceil(W/factor)) of that type, within the range of the image, or of
    `pixels` (by default 8 bits) where the pipeline adds noise.

    rng: what random rules are drawn from.
    """
    if rule.is_random and rng is None:
        raise ValueError(f"{rule} is random and needs a generator")
    if rule.pipeline != "bicubic":
        assert rng is not None
        pixels = pixels or PixelFormat()
        values = (pixels.to_network(image) + 1) / 2
        return pixels.from_network(2 * degrade_blindly(values, rule.factor, STRENGTHS[rule.pipeline], rng) - 1)
    least, greatest = rule.blur_range
    blur = least if rng is None else float(rng.uniform(least, greatest))
    values = image.float()
    low, high = values.min(), values.max()
    if blur:
        values = blurred(values[None], blur)[0]
    if rule.factor > 1:
        height, width = (-(-side // rule.factor) for side in values.shape[1:])
        values = bicubic(values, (height, width)).clamp(low, high)  # bicubic overshoots
    return (values if image.dtype.is_floating_point else values.round()).to(image.dtype)


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
