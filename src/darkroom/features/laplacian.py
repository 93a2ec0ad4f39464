"""Distances that need no trained weights, on Laplacian pyramids.

The perceptual one is the normalised Laplacian pyramid:

Laparra, Ballé, Berardino & Simoncelli 2016, "Perceptual image quality assessment using a normalized Laplacian
pyramid". Each band of the pyramid is divided by the local mean of its magnitude, as contrast is in early vision; errors
count less where the image is busy. Two choices differ from the paper: every channel is treated alike, and the
neighbourhood is the same symmetric window in all bands instead of one fitted to photographs.

The filters are separable and run as products with small banded matrices, y = A_h x A_w^T, which hold the mirrored
edges: on a CPU many times faster than convolutions of one channel, forward and backward.
Shapes: B batch, C channels, H W image size, N = 2*B*C planes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

FILTER = (0.05, 0.25, 0.4, 0.25, 0.05)  # Burt & Adelson 1983, a = 0.4: the filter of the paper
SIGMA = 0.17  # contrast at which the division saturates, for images in [0, 1]
EPSILON = 1e-4  # keeps the gradient of the root finite where two bands agree


class NormalisedLaplacianDistance(nn.Module):
    """(B, C, H, W) twice, in [-1, 1] -> (B,): mean over bands of the root mean square difference, each band divided by
    the local mean of its magnitude.

    `levels - 1` band-pass images, one octave each, as long as both sides have at least 4 pixels, and the low-pass rest.
    """

    def __init__(self, levels: int = 5) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
            distances = []
            for band in laplacian_pyramid(_planes(image.to(dtype), other.to(dtype)), self.levels):
                normalised = band / (SIGMA + _apply(_blur_matrix, band.abs()))
                distances.append(_rms_difference(*normalised.view(2, image.shape[0], -1)))
            return torch.stack(distances).mean(0)


def laplacian_pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """(N, H, W) -> [finest, ..., low-pass]; x = finest + expand(next finest + expand(...))."""
    bands: list[Tensor] = []
    while len(bands) < levels - 1 and min(x.shape[-2:]) >= 4:
        low = reduce(x)
        bands.append(x - expand(low, x.shape[-2], x.shape[-1]))
        x = low
    return [*bands, x]


def _planes(image: Tensor, other: Tensor) -> Tensor:
    """(B, C, H, W) twice in [-1, 1] -> (N, H, W) in [0, 1]."""
    return (torch.cat([image, other]) * 0.5 + 0.5).contiguous().flatten(0, 1)


def _rms_difference(one: Tensor, other: Tensor) -> Tensor:
    """(B, D) twice -> (B,): root mean square difference, smooth at 0."""
    square = (one - other).square().mean(1)
    # sqrt(square + EPSILON^2) - EPSILON, written so that 0 stays exactly 0
    return square / ((square + EPSILON**2).sqrt() + EPSILON)


def reduce(x: Tensor) -> Tensor:
    """(N, H, W) -> (N, ceil(H / 2), ceil(W / 2)): the filter at every second pixel of every second row."""
    return _apply(_reduce_matrix, x)


def expand(x: Tensor, height: int, width: int) -> Tensor:
    """(N, h, w) -> (N, H, W), H in {2h - 1, 2h}: zeros between the pixels, then the filter, times 4."""
    return _expand_matrix(height).to(x) @ x @ _expand_matrix(width).to(x).T


def _apply(matrix: Callable[[int], Tensor], x: Tensor) -> Tensor:
    """The filter along rows and columns of (N, H, W)."""
    return matrix(x.shape[-2]).to(x) @ x @ matrix(x.shape[-1]).to(x).T


@lru_cache(maxsize=64)
def _blur_matrix(size: int) -> Tensor:
    """(size, size): the filter, mirrored at the edges without repeating them."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for offset, weight in enumerate(FILTER, -2):
            matrix[i, _mirror(i + offset, size)] += weight
    return matrix


@lru_cache(maxsize=64)
def _reduce_matrix(size: int) -> Tensor:
    """(ceil(size / 2), size): the filter at every second position."""
    return _blur_matrix(size)[::2].contiguous()


@lru_cache(maxsize=64)
def _expand_matrix(size: int) -> Tensor:
    """(size, ceil(size / 2)): the filter on the image with zeros between its pixels, times 2; rows sum to 1."""
    return 2.0 * _blur_matrix(size)[:, ::2].contiguous() if size > 1 else torch.ones(1, 1, dtype=torch.float64)


def _mirror(i: int, size: int) -> int:
    """Reflect an index into [0, size) as often as it takes."""
    if size == 1:
        return 0
    i %= 2 * (size - 1)
    return min(i, 2 * (size - 1) - i)
