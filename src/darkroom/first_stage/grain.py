"""Fixed noise that a decoder may draw texture from: `Grain` within the network, `OutputGrain` on its image.

What a latent cannot tell of an image, its grain, a decoder can only make up. A convolutional network that is given
nothing to make it up from repeats one pattern at each position of the latent, which shows as a weave; given noise it
need not (Karras et al. 2019, "A Style-Based Generator Architecture", sec. 3.2). The noise is the same each time and is
stored with the weights, so that a latent keeps one picture.

`OutputGrain` is the plainer way: the network's output is a mean, as before, and from the same features follows the
variance of the grain that the mean lacks. The mean stays the image of least squared error, and what the grain is made
of cannot turn into a pattern of it. Nothing about it is trained by steps: `fit_output_grain` solves for it.

Shapes: B batch, C channels, H W map size, n rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.kernels import Conv1x1

if TYPE_CHECKING:
    from darkroom.first_stage.autoencoder import Autoencoder

SIDE = 64  # positions after which the noise repeats itself
CHANNELS = 4
UNIT = 0.01  # of the grain's variance on images in [-1, 1]: weights of about 1 keep their digits in float16
FAINT = 0.01  # of UNIT: what output grain begins with, a standard deviation of 0.01
LEAST = 1e-6  # of UNIT: the root of 0 has no gradient


class Grain(nn.Module):
    """(B, C, H, W) -> same: x + a 1x1 convolution of noise, which begins as nothing."""

    noise: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        noise = torch.empty(1, CHANNELS, SIDE, SIDE)
        self.register_buffer("noise", nn.init.normal_(noise))
        self.project = Conv1x1(CHANNELS, channels)
        nn.init.zeros_(self.project.weight)
        assert self.project.bias is not None
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows(0, x.shape[2], x.shape[3]).to(x.dtype)

    def rows(self, start: int, stop: int, width: int) -> Tensor:
        """(1, C, n, W): what is added to these rows of a map."""
        noise = self.noise.to(self.project.weight.dtype).contiguous(memory_format=torch.channels_last)
        tile = self.project(noise)  # before it is repeated: a small map
        down = torch.arange(start, stop, device=tile.device) % SIDE
        right = torch.arange(width, device=tile.device) % SIDE
        return tile[:, :, down][..., right]


class OutputGrain(nn.Module):
    """(B, C, H, W) features -> (B, 1, H, W): sqrt(v) n, the variance v a 3x3 convolution of the features and of their
    squares, n fixed noise of variance 1. It is added to all channels alike: what a decoder cannot know is brightness,
    mostly. Squares, because neither the darkest places of a photo nor its brightest are rough."""

    noise: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("noise", fine_noise())
        self.variance = nn.Conv2d(2 * channels, 1, 3, padding=1)
        nn.init.zeros_(self.variance.weight)
        assert self.variance.bias is not None
        nn.init.constant_(self.variance.bias, FAINT)

    def forward(self, features: Tensor) -> Tensor:
        return self.of_variance(self.variance(with_squares(features)), 0)

    def of_variance(self, variance: Tensor, start: int) -> Tensor:
        """(B, 1, n, W): the rows of v / UNIT from `start` on -> (B, 1, n, W)."""
        down = torch.arange(start, start + variance.shape[2], device=variance.device) % SIDE
        right = torch.arange(variance.shape[3], device=variance.device) % SIDE
        noise = self.noise[:, :, down][..., right].to(variance.dtype)
        return (UNIT * variance.clamp(min=LEAST)).sqrt() * noise


def with_squares(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 2 C, H, W)"""
    return torch.cat([features, features.square()], 1)


def fine_noise() -> Tensor:
    """(1, 1, SIDE, SIDE) of variance 1: white noise less its binomial mean, since coarser noise costs more squared
    error for as much texture. It continues at the opposite edge, so that tiles of it have no seams."""
    white = torch.randn(1, 1, SIDE, SIDE)
    weights = torch.tensor([0.25, 0.5, 0.25])
    mean = F.conv2d(F.pad(white, (1, 1, 1, 1), mode="circular"), torch.outer(weights, weights)[None, None])
    fine = white - mean
    return fine / fine.std(correction=0)


# --- the variance of the grain on the image, in closed form ---------------------------------------------------------

WINDOW = 8  # pixels, of the local means that are compared: fewer say nothing about a variance
SMOOTH = 0.01  # energies below it weigh alike
RIDGE = 1e-4  # of the mean square of a feature


@torch.no_grad()
def fit_output_grain(autoencoder: Autoencoder, images: Iterable[Tensor], share: float = 1.0) -> None:
    """Sets the weights of an autoencoder's output grain so that it is as rough as what the mean image lacks.

    A place p of an image x has the gradient energy E_x = |x(p) - x(p + right)|^2 + |x(p) - x(p + down)|^2. Grain of
    variance v adds v E_n to that of the mean m, E_n the energy of the noise. So v = w phi + b, phi the features and
    their squares at the 3x3 places around, is fitted to (E_x - E_m) / E_n by least squares: right in (weighted) sum,
    and where features tell rough places from smooth ones, there. Both sides are means over small windows, which loses
    nothing, as v is linear; one weight serves all nine places, which windows cannot tell apart. Squares are divided by
    E_m: at outlines, energies are large, and so are their differences, of which little is grain.

    images: batches (B, C, H, W) in [-1, 1]. share: of what lacks; 1 is all. Below it the squared error is smaller.
    """
    grain = autoencoder.decoder.grain
    if grain is None:
        raise DarkroomError('this decoder has no grain on its image: build it with "output_grain": true')
    check_share(share)
    device, size = grain.noise.device, grain.variance.in_channels + 1
    normal, target = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    noise_energy = _local_energy(torch.cat([torch.cat([grain.noise] * 2, 2)] * 2, 3)).mean()
    count = 0
    for batch in images:
        image = batch.to(device)
        z = autoencoder.encode(image).mode()
        if autoencoder.codebook is not None:
            z = autoencoder.codebook.lookup(autoencoder.codebook.nearest(z))
        features = autoencoder.decoder_features(z).float()
        energy = _local_energy(autoencoder.decoder.conv_out(features))
        lacks = ((_local_energy(image) - energy) / (noise_energy * UNIT)).flatten().double().cpu()
        rows = _local_features(with_squares(features)).double().cpu()  # (places, 2 C + 1)
        weighted = rows / (energy.flatten().double().cpu() + SMOOTH)[:, None]
        normal += weighted.T @ rows
        target += weighted.T @ lacks
        count += len(rows)
    if not count:
        raise DarkroomError("no images to measure their grain on: give at least one batch")
    ridge = RIDGE * normal.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    solution = share**2 * torch.linalg.solve(normal + ridge, target)
    assert grain.variance.bias is not None
    grain.variance.weight.copy_((solution[:-1] / 9).view(1, -1, 1, 1).expand_as(grain.variance.weight))
    grain.variance.bias.copy_(solution[-1:])


def check_share(share: float) -> None:
    """Raises DarkroomError for what `fit_output_grain` cannot add."""
    if not 0 <= share <= 2:
        raise DarkroomError(f"a share of {share:g} of the missing grain: give a number from 0 to 2, 1 is all of it")


def _local_energy(t: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, rows, columns): of differences of neighbours, the mean over channels and windows."""
    down, right = t.diff(dim=2)[..., :-1], t.diff(dim=3)[:, :, :-1]
    return _window_means((down.square() + right.square()).mean(1, keepdim=True))


def _local_features(features: Tensor) -> Tensor:
    """(B, K, H, W) -> (B * rows * columns, K + 1), means over the windows of `_local_energy`: what a 3x3 convolution
    with the same weight at all its taps meets, and a 1."""
    near = F.avg_pool2d(features, 3, stride=1, padding=1)[:, :, :-1, :-1]
    rows = _window_means(near).permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def _window_means(t: Tensor) -> Tensor:
    return F.avg_pool2d(t, [min(WINDOW, side) for side in t.shape[2:]])
