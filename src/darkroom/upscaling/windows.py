"""A denoiser of small latents as one of a canvas of any size: in every step each overlapping window is denoised on its
own, and what the windows say about a place is averaged (Bar-Tal et al. 2023, MultiDiffusion, eq. 5).

There is one noisy canvas, so windows never disagree about what they see, and a step of every solver is linear in x0:
to average x0 is to average the steps. Weights fall smoothly to zero where a neighbour goes on, so that no border is
left in the mean. Sums are made in float64, whose rounding is lost in float32: the order of the windows makes no
difference.

Shapes: B batch, C channels, H W canvas, N windows of h w places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.diffusion.levels import NoiseLevel
from darkroom.errors import DarkroomError
from darkroom.first_stage.blended import Range, tile_ranges
from darkroom.guidance import Guided


@dataclass(frozen=True)
class Window:
    """rows and columns: (start, stop) on the canvas; weight: (h, w) float64 share of the mean at each place."""

    rows: Range
    columns: Range
    weight: Tensor

    def of(self, canvas: Tensor) -> Tensor:
        """(..., H, W) -> the part (..., h, w) that it sees."""
        return canvas[..., slice(*self.rows), slice(*self.columns)]


def make_windows(height: int, width: int, side: int, overlap: int, multiple: int = 1) -> list[Window]:
    """The fewest windows of `side` (less where the canvas is smaller) that cover H x W, evenly spread, and share at
    least `overlap` places with their neighbours. They begin at multiples of `multiple`, where the levels of the network
    would begin on the whole canvas too; H, W and side are multiples of it."""
    if side % multiple or height % multiple or width % multiple or side < 1:
        raise DarkroomError(f"windows of {side} on {width}x{height} latent places: all are multiples of {multiple}")
    if not 0 <= 2 * overlap <= side:
        raise DarkroomError(f"windows of {side} latent places overlap by 0 to {side // 2}, not by {overlap}")
    shared = -(-overlap // multiple)
    if side // multiple == shared and max(height, width) > side:  # they would not advance
        raise DarkroomError(f"windows of {side} latent places begin at multiples of {multiple} and cannot overlap")
    rows, columns = (
        [(start * multiple, stop * multiple) for start, stop in tile_ranges(n // multiple, side // multiple, shared)]
        for n in (height, width)
    )
    down, across = (shares(ranges) for ranges in (rows, columns))
    return [
        Window(r, c, a[:, None] * b[None])
        for r, a in zip(rows, down, strict=True)
        for c, b in zip(columns, across, strict=True)
    ]


def shares(ranges: Sequence[Range]) -> list[Tensor]:
    """For evenly spread overlapping ranges in order, (n,) float64 each: weights that sum to 1 at every place. Towards a
    neighbour they fall over all that both share as sin^2, whose slope is 0 at both ends."""
    ramps = []
    for i, (start, stop) in enumerate(ranges):
        ramp = torch.ones(stop - start, dtype=torch.float64)
        places = torch.arange(start, stop, dtype=torch.float64) + 0.5
        if i > 0 and (shared := ranges[i - 1][1] - start) > 0:
            ramp *= _rise((places - start) / shared)
        if i + 1 < len(ranges) and (shared := stop - ranges[i + 1][0]) > 0:
            ramp *= _rise((stop - places) / shared)
        ramps.append(ramp)
    total = torch.zeros(ranges[-1][1], dtype=torch.float64)
    for ramp, (start, stop) in zip(ramps, ranges, strict=True):
        total[start:stop] += ramp
    return [ramp / total[start:stop] for ramp, (start, stop) in zip(ramps, ranges, strict=True)]


def _rise(position: Tensor) -> Tensor:
    """0 at 0, 1 from 1 on."""
    return torch.sin(math.pi / 2 * position.clamp(0, 1)) ** 2


class WindowedDenoise:
    """(x, level) -> x0 on the whole canvas (1, C, H, W).

    guided: the denoiser with conditioning of the canvas' size; windows are shown their part of its maps.
    windows: in any order. batch_size: how many at a time.
    on_windows: called with the number of windows done in this evaluation.
    nfe: network evaluations per window so far.
    """

    def __init__(
        self,
        guided: Guided,
        windows: Sequence[Window],
        batch_size: int,
        on_windows: Callable[[int], None] | None = None,
    ) -> None:
        self.windows, self.on_windows, self.nfe = list(windows), on_windows, 0
        batches = [self.windows[i : i + batch_size] for i in range(0, len(self.windows), batch_size)]
        self._batches = [(part, guided.mapped(partial(seen, windows=part))) for part in batches]

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        total = torch.zeros(x.shape, dtype=torch.float64)
        done, before = 0, self._batches[0][1].nfe
        for windows, guided in self._batches:
            estimates = guided(torch.cat([w.of(x) for w in windows]), level)
            for window, estimate in zip(windows, estimates.double().cpu(), strict=True):
                window.of(total[0]).add_(estimate * window.weight)
            done += len(windows)
            if self.on_windows is not None:
                self.on_windows(done)
        self.nfe += self._batches[0][1].nfe - before
        return total.to(x)


def seen(conditioning: Conditioning, windows: Sequence[Window]) -> Conditioning:
    """Conditioning of one canvas -> of N windows of it: maps are cut, everything else is the same for all."""

    def repeated(value: Tensor) -> Tensor:
        return value.expand(len(windows), *value.shape[1:])

    whole = replace(conditioning, concat=None).map(repeated)
    if conditioning.concat is None:
        return whole
    return replace(whole, concat=torch.cat([w.of(conditioning.concat) for w in windows]))
