"""Fixed noise that a decoder may draw texture from: `Grain` within the network, `OutputGrain` on its image.

What a latent cannot tell of an image, its grain, a decoder can only make up. A convolutional network that is given
nothing to make it up from repeats one pattern at each position of the latent, which shows as a weave; given noise it
need not (Karras et al. 2019, "A Style-Based Generator Architecture", sec. 3.2). The noise is the same each time and is
stored with the weights, so that a latent keeps one picture.

`OutputGrain` is the plainer way: the network's output is a mean, as before, and from the same features it says how
strong the grain is that the mean lacks, band by band. The mean stays the image of least squared error, and nothing that
was learned for the grain can turn into a pattern of the mean.

Shapes: B batch, C channels, H W map size, n rows, K bands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.kernels import Conv1x1

SIDE = 64  # positions after which the noise repeats itself
CHANNELS = 4
BANDS = 2  # of the grain on the image: differences of neighbours, and of places two pixels apart
FAINT = -4.5  # softplus of it, 0.011 in [-1, 1], is what output grain begins with


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
    """(B, C, H, W) features -> (B, 1, H, W): sum_k softplus(s_k) n_k, s a 3x3 convolution of the features, n_k noise of
    variance 1 in the band k. It is added to all channels alike: what a decoder cannot know is brightness, mostly."""

    noise: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("noise", noise_bands())
        self.strength = nn.Conv2d(channels, BANDS, 3, padding=1)
        nn.init.zeros_(self.strength.weight)
        assert self.strength.bias is not None
        nn.init.constant_(self.strength.bias, FAINT)

    def forward(self, features: Tensor) -> Tensor:
        return self.of_strength(self.strength(features), 0)

    def of_strength(self, strength: Tensor, start: int) -> Tensor:
        """(B, K, n, W): the rows of s from `start` on -> (B, 1, n, W)."""
        down = torch.arange(start, start + strength.shape[2], device=strength.device) % SIDE
        right = torch.arange(strength.shape[3], device=strength.device) % SIDE
        noise = self.noise[:, :, down][..., right].to(strength.dtype)
        return (F.softplus(strength) * noise).sum(1, keepdim=True)


def noise_bands() -> Tensor:
    """(1, K, SIDE, SIDE) of variance 1 each: white noise less its binomial mean, and the difference of two such means.
    It continues at the opposite edge, so that tiles of it have no seams."""
    white = torch.randn(BANDS, 1, SIDE, SIDE)
    coarse = _binomial_mean(white[1:])
    bands = torch.cat([white[:1] - _binomial_mean(white[:1]), coarse - _binomial_mean(_binomial_mean(coarse))], 1)
    return bands / bands.std((2, 3), correction=0, keepdim=True)


def _binomial_mean(t: Tensor) -> Tensor:
    """(N, 1, H, W) -> same: over 3x3 places with the weights 1 2 1."""
    weights = torch.tensor([0.25, 0.5, 0.25])
    return F.conv2d(F.pad(t, (1, 1, 1, 1), mode="circular"), torch.outer(weights, weights)[None, None])
