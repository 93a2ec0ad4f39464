"""Distortions of graded strength, by which perceptual distances are trained and tested.

Each takes images with a margin around them, (B, C, H + 2*MARGIN, W + 2*MARGIN) in [-1, 1], so that shifts and blurs
have true content to draw from, and a strength in [0, 1] per image; `cut` takes the margin off. What is random about a
distortion (its direction, noise, places) comes from a generator: the same seed with a larger strength is the same
distortion, only stronger. Shapes: B batch, C channels, H W image size.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MARGIN = 8
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))


def cut(image: Tensor) -> Tensor:
    """The image without its margin."""
    return image[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def blur(image: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian, standard deviation 0.4 to 3.2 pixels."""
    return gaussian_blur(image, 0.4 * 8.0**strength)


def gaussian_blur(image: Tensor, deviation: Tensor) -> Tensor:
    """Each image with its own standard deviation (B,) in pixels; edges replicated."""
    batch, channels = image.shape[:2]
    reach = MARGIN + 1
    offsets = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offsets / deviation.to(image).view(-1, 1)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    x = F.pad(image, (reach,) * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    x = F.conv2d(x, kernel.view(batch * channels, 1, 1, -1), groups=batch * channels)
    x = F.conv2d(x, kernel.view(batch * channels, 1, -1, 1), groups=batch * channels)
    return x.view_as(image)


def noise(image: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """White Gaussian, standard deviation 0.02 to 0.4."""
    draw = torch.randn(image.shape, generator=generator)
    return (image + _column(0.02 * 20.0**strength) * draw).clamp(-1.0, 1.0)


def jpeg(image: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Quality 95 down to 5, of 1 or 3 channels."""
    levels = ((image.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    out = np.empty_like(levels)
    for i, value in enumerate(strength.tolist()):
        file = io.BytesIO()
        picture = Image.fromarray(levels[i] if levels.shape[-1] == 3 else levels[i, ..., 0])
        picture.save(file, "JPEG", quality=round(95 - 90 * value))
        out[i] = np.asarray(Image.open(file)).reshape(levels.shape[1:])
    return torch.from_numpy(out).permute(0, 3, 1, 2).to(image) / 127.5 - 1.0


def shift(image: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """By 1 to 8 whole pixels along an axis or a diagonal."""
    chosen = torch.randint(len(DIRECTIONS), (image.shape[0],), generator=generator).tolist()
    pixels = (8.0**strength).round().int().tolist()
    moved = [
        torch.roll(x, (DIRECTIONS[d][0] * n, DIRECTIONS[d][1] * n), (1, 2))
        for x, d, n in zip(image, chosen, pixels, strict=True)
    ]
    return torch.stack(moved)


def colour(image: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A cast: the channels move by different amounts, 0.03 to 0.6 together, away from the nearer end of the range."""
    direction = torch.randn(image.shape[:2], generator=generator).abs()
    direction = F.normalize(direction, dim=1) * -torch.sign(image.mean((2, 3)) + 1e-6)
    return (image + _column(0.03 * 20.0**strength) * direction[..., None, None]).clamp(-1.0, 1.0)


def block(image: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """1 to 24 squares of 8 pixels, each in one colour near that of the place."""
    batch, channels, height, width = image.shape
    most = 24
    rows = torch.randint(MARGIN, height - MARGIN - 7, (batch, most), generator=generator).tolist()
    columns = torch.randint(MARGIN, width - MARGIN - 7, (batch, most), generator=generator).tolist()
    offsets = torch.randn((batch, most, channels), generator=generator) * 0.3
    counts = (float(most) ** strength).round().int().tolist()
    out = image.clone()
    for i in range(batch):
        for j in range(counts[i]):
            y, x = rows[i][j], columns[i][j]
            mean = image[i, :, y : y + 8, x : x + 8].mean((1, 2))
            sign = -torch.sign(mean + 1e-6)
            out[i, :, y : y + 8, x : x + 8] = (mean + sign * offsets[i, j].abs())[:, None, None]
    return out


def mosaic(image: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Mixed with its version in flat tiles of 8 pixels: 5 to 100 per cent of it."""
    tiles = F.avg_pool2d(image, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    tiles = F.pad(tiles, (0, image.shape[3] - tiles.shape[3], 0, image.shape[2] - tiles.shape[2]), mode="replicate")
    return image + _column(0.05 * 20.0**strength) * (tiles - image)


def grid(image: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A pattern that repeats every 2, 4 or 8 pixels, as careless upsampling leaves it; deviation 0.01 to 0.3."""
    batch, channels, height, width = image.shape
    periods = (2, 4, 8)
    chosen = torch.randint(len(periods), (batch,), generator=generator).tolist()
    tiles = torch.randn((batch, channels, periods[-1], periods[-1]), generator=generator)
    patterns = []
    for tile, number in zip(tiles, chosen, strict=True):
        side = periods[number]
        part = tile[:, :side, :side]
        part = part - part.mean((1, 2), keepdim=True)
        part = part / part.square().mean().sqrt()
        patterns.append(part.repeat(1, -(-height // side), -(-width // side))[:, :height, :width])
    return (image + _column(0.01 * 30.0**strength) * torch.stack(patterns)).clamp(-1.0, 1.0)


def _column(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


Distortion = Callable[[Tensor, Tensor, torch.Generator], Tensor]
DISTORTIONS: dict[str, Distortion] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "shift": shift,
    "colour": colour,
    "block": block,
    "mosaic": mosaic,
    "grid": grid,
}
