"""How pictures are brought to the size of a network. A score depends on it, so each rule is that of a protocol.

Shapes: B batch, C channels, H W image size, h w the size asked for. Pixels are in [0, 255].
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

FIXED_POINT = 1 << 22  # Pillow's weights for bytes are multiples of its inverse


def resize_tf1(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) float -> (B, C, h, w): `tf.image.resize_bilinear` of TensorFlow 1, which FID was defined with.

    Position i looks at i * H/h (corners of pixels, not their centres), between floor and floor + 1, without smoothing,
    and the position is rounded to float32 as there. (torch-fidelity and the statistics that papers publish use it.)
    """
    for dim, length in ((3, size[1]), (2, size[0])):
        old = image.shape[dim]
        place = torch.arange(length, dtype=torch.float32, device=image.device) * torch.tensor(old / length)
        low = place.long()
        high = (low + 1).clamp_max(old - 1)
        share = (place - low).to(image.dtype)
        share = share if dim == 3 else share[:, None]
        image = torch.lerp(image.index_select(dim, low), image.index_select(dim, high), share)
    return image


def resize_bicubic(image: Tensor, size: tuple[int, int], *, rounded: bool) -> Tensor:
    """(B, C, H, W) float -> (B, C, h, w): Pillow's bicubic resize (a = -0.5, smoothed where the picture shrinks).

    rounded: False as Pillow treats one channel of floats ("F"), clipped to [0, 255] at the end: the rule of clean-fid.
             True as it treats pictures of bytes: rows, then columns, each rounded to whole numbers. Done in its own
             whole numbers, which float64 holds exactly, so that the bytes are the same.
    """
    result = image.double() if rounded else image
    for dim, length in ((3, size[1]), (2, size[0])):
        if image.shape[dim] == length:
            continue
        places, weights = pillow_taps(image.shape[dim], length)
        if rounded:
            result = _along(result, places, (weights * FIXED_POINT).round(), dim)
            result = ((result + FIXED_POINT // 2) / FIXED_POINT).floor().clamp(0, 255)
        else:
            result = _along(result, places, weights, dim)
    return result.to(image.dtype) if rounded else result.clamp(0, 255)


def _along(image: Tensor, places: Tensor, weights: Tensor, dim: int) -> Tensor:
    """sum_t weights[t] * image[places[t]] along the rows (dim 2) or columns (dim 3); rows are what lies together in
    memory, so columns are laid down first."""
    rows = image.transpose(2, 3).contiguous() if dim == 3 else image
    total = torch.zeros_like(rows[:, :, :1]).expand(-1, -1, places.shape[1], -1).contiguous()
    for place, weight in zip(places.to(rows.device), weights.to(rows), strict=True):
        total.addcmul_(rows.index_select(2, place), weight[:, None])
    return total.transpose(2, 3) if dim == 3 else total


@lru_cache(maxsize=32)
def pillow_taps(old: int, new: int) -> tuple[Tensor, Tensor]:
    """(T, new) int64, (T, new) float64: the old pixels that make up each new one, and their shares, which add up to 1.

    Cubic convolution (Keys 1981, a = -0.5) around the centre (i + 1/2) old/new; where the picture shrinks, the kernel
    is as much wider. Pixels take part whose centre is at most half a pixel outside of it, as in Pillow.
    """
    step = old / new
    wide = max(step, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * step
    first = (centre - 2 * wide + 0.5).trunc().clamp_min(0)
    last = (centre + 2 * wide + 0.5).trunc().clamp_max(old)
    place = first + torch.arange(int((last - first).max()))[:, None]
    x = ((place + 0.5 - centre) / wide).abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((x - 5.0) * x + 8.0) * x * -0.5 + 2.0
    kernel = torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))
    kernel = torch.where(place < last, kernel, 0.0)
    return place.clamp_max(old - 1).long(), kernel / kernel.sum(0)


def shorter_side_and_centre(image: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side): the shorter side to `side` by Pillow's bicubic rule for bytes, then the
    centre, as the preprocessing of CLIP does (Radford et al. 2021, released code)."""
    height, width = image.shape[2:]
    shorter = min(height, width)
    size = (int(side * height / shorter), int(side * width / shorter))
    image = resize_bicubic(image, size, rounded=True)
    top, left = round((size[0] - side) / 2.0), round((size[1] - side) / 2.0)
    return image[:, :, top : top + side, left : left + side]
