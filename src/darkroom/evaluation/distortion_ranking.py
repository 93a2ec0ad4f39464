"""Does a distance see pictures as people do? Two questions that need no human answers.

Of one distortion at several strengths the stronger must be further away (Spearman's rank correlation of strength and
distance, per picture), and a picture moved by one pixel must be nearer than a visibly blurred one. Pixel-wise scores
pass the first and fail the second. Shapes: B batch, C channels, H W image size; L strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from darkroom.data.distortions import DISTORTIONS, cut, gaussian_blur

Distance = Callable[[Tensor, Tensor], Tensor]  # (B, C, H, W) twice -> (B,), larger is further
EVEN = tuple(i / 5 for i in range(6))
STRENGTHS: dict[str, tuple[float, ...]] = dict.fromkeys(DISTORTIONS, EVEN) | {
    "shift": tuple(math.log(n, 8) for n in (1, 2, 3, 4, 6, 8)),  # whole pixels
    "block": tuple(math.log(n, 24) for n in (1, 2, 4, 8, 16, 24)),  # whole blocks
}
DEVIATIONS = (0.75, 1.0, 1.5, 2.0, 3.0)  # of the blurs that a shift by one pixel is compared with, in pixels


@torch.no_grad()
def distances_by_strength(distance: Distance, wide: Tensor, kind: str, seed: int = 0) -> Tensor:
    """(L, B): distances from pictures with their margin, `wide`, to their distortions of one kind."""
    rows = []
    for strength in STRENGTHS[kind]:
        generator = torch.Generator().manual_seed(seed)
        distorted = DISTORTIONS[kind](wide, torch.full((len(wide),), strength), generator)
        rows.append(distance(cut(wide), cut(distorted)))
    return torch.stack(rows)


def spearman(values: Tensor) -> Tensor:
    """(L, B) -> (B,): rank correlation of each column with 0..L-1; equal values share their mean rank."""
    ranks = (values[:, None] > values[None]).sum(1) + ((values[:, None] == values[None]).sum(1) - 1) / 2
    order = torch.arange(len(values), dtype=torch.float64)[:, None]
    a, b = ranks.double() - ranks.double().mean(0), order - order.mean()
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum()).sqrt().clamp_min(1e-12)


@torch.no_grad()
def shift_before_blur(distance: Distance, wide: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """(B,) bool: whether the picture moved by one pixel is nearer than the blurred one."""
    moved = DISTORTIONS["shift"](wide, torch.zeros(len(wide)), torch.Generator().manual_seed(seed))
    blurred = gaussian_blur(wide, torch.full((len(wide),), deviation))
    return distance(cut(wide), cut(moved)) < distance(cut(wide), cut(blurred))
