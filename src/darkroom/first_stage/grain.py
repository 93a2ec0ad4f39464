"""Fixed noise that a decoder may draw texture from.

What a latent cannot tell of an image, its grain, a decoder can only make up. A convolutional network that is given
nothing to make it up from repeats one pattern at each position of the latent, which shows as a weave; given noise it
need not (Karras et al. 2019, "A Style-Based Generator Architecture", sec. 3.2). The noise is the same each time and is
stored with the weights, so that a latent keeps one picture.

Shapes: B batch, C channels, H W map size, S side of the noise, n rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from darkroom.kernels import Conv1x1

SIDE = 64  # positions after which the noise repeats itself
CHANNELS = 4


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
