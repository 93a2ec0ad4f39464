"""`Inpaint`: any model repaints a part of a picture and keeps the rest, without having been trained for it.

It wraps `denoise` and is again (x, level) -> x0, so that solvers and guidance know nothing of it.
Shapes: B batch, C channels, H W image size, h w latent size. Masks: 1 = repaint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.diffusion.grids import Grid
from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.errors import DarkroomError

Denoise = Callable[[Tensor, NoiseLevel], Tensor]


class Inpaint:
    """(x, level) -> x0 of any `denoise`, with x0 = `known` outside of the mask.

    That is all it takes (Song et al. 2021, App. I.2, replace x there at every level). Where x begins as alpha*known +
    sigma*noise (see `begin`), a solver that is told x0 = known keeps it so at every level: with the image's first noise
    if it draws none, with fresh noise of the image's seed as far as it draws some, and without any in the end.
    Kept and repainted parts agree better when steps are taken back and made again: see `solvers.repaint`.
    """

    def __init__(self, denoise: Denoise, known: Tensor, mask: Tensor) -> None:
        """known (B, C, h, w): clean latents; mask (B, 1, h, w)."""
        self.denoise, self.known = denoise, known
        self.repainted = mask >= 0.5

    @property
    def nfe(self) -> int:
        return int(getattr(self.denoise, "nfe", 0))

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self._kept(self.denoise(x, level))

    def predict(self, x: Tensor, level: NoiseLevel) -> Any:
        """For solvers that ask for more than x0."""
        inner: Any = self.denoise
        prediction = inner.predict(x, level)
        return replace(prediction, x0=self._kept(prediction.x0))

    def _kept(self, x0: Tensor) -> Tensor:
        return torch.where(self.repainted, x0, self.known.to(x0))


@dataclass(frozen=True)
class Start:
    """What an edit begins with: pictures (N, C, H, W) in [-1, 1], or one for all images.

    mask:     (N, 1, H, W): what is repainted, by `Inpaint`; None: all of it, or the model itself knows the mask
    strength: share of the steps that is made. Below 1 images begin from the pictures with the noise of the first level
              that is left, and so keep the more of them the smaller it is
    """

    image: Tensor
    mask: Tensor | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise DarkroomError(
                f"strength is {self.strength:g}: it must be above 0 (no change) and at most 1 (all new)"
            )

    def steps(self, whole: int) -> int:
        """How many of so many steps are made: at least one."""
        return max(1, round(whole * self.strength))

    def part(self, which: slice) -> Start:
        """What belongs to some of the images."""

        def some(values: Tensor) -> Tensor:
            return values if len(values) == 1 else values[which]

        return replace(self, image=some(self.image), mask=None if self.mask is None else some(self.mask))


def begin(
    denoise: Denoise, start: Start, known: Tensor, noise: Tensor, grid: Grid, prior_std: float, f: int
) -> tuple[Denoise, Tensor, Grid]:
    """(denoise, x, grid) of an edit of B images, of which `start` has all pictures or one.

    known: latents of its pictures; noise (B, C, h, w): what images begin from; grid: of all steps; f: from latent to
    image.
    """
    left = grid.truncate(grid.steps - start.steps(grid.steps))
    known = known.to(noise).expand_as(noise)
    x = noise * prior_std if left.steps == grid.steps else add_noise(known, noise, left[0])
    if start.mask is None:
        return denoise, x, left
    inpaint = Inpaint(denoise, known, covering(start.mask.to(noise), f))
    return inpaint, torch.where(inpaint.repainted, x, add_noise(known, noise, left[0])), left


def covering(mask: Tensor, f: int) -> Tensor:
    """(B, 1, H, W) -> (B, 1, h, w): 1 for every block of which some pixel is repainted."""
    return F.max_pool2d(mask, f, ceil_mode=True)
