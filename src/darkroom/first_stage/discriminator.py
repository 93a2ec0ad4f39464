"""PatchGAN: one logit per overlapping patch (Isola et al. 2017, sec. 3.2), with the official state-dict keys `main.*`.

Shapes: B batch, C channels, H W image size, h w number of patches.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

DiscriminatorNorm = Literal["batch", "group"]


class Discriminator(nn.Module):
    """(B, C, H, W) -> logits (B, 1, h, w). `layers` strided convolutions after the first; 3 see patches of 70x70.

    `norm`: "batch" is the official one. "group" makes the logits of an image independent of the rest of its batch, so
    that small batches, gradient accumulation and several processes train the same model.
    """

    def __init__(
        self, in_channels: int = 3, channels: int = 64, layers: int = 3, norm: DiscriminatorNorm = "batch"
    ) -> None:
        super().__init__()
        self.independent = norm == "group"
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            out = channels * min(2**i, 8)
            blocks += [
                nn.Conv2d(width, out, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(out) if norm == "batch" else nn.GroupNorm(math.gcd(8, out), out),
                nn.LeakyReLU(0.2),
            ]
            width = out
        self.main = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        return self.main(image)


def _initialise(module: nn.Module) -> None:
    """The official start: weights of deviation 0.02, around 0 for convolutions and around 1 for norms."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
