"""A perceptual distance that needs no trained weights: the normalised Laplacian pyramid.

Laparra, Ballé, Berardino & Simoncelli 2016, "Perceptual image quality assessment using a normalized Laplacian
pyramid". Each band of the pyramid is divided by the local mean of its magnitude, as contrast is in early vision; errors
count less where the image is busy. Three choices differ from the paper: every channel is treated alike, the
neighbourhood is the same symmetric window in all bands instead of one fitted to photographs, and a low-pass image is
enlarged bilinearly.
Shapes: B batch, C channels, H W image size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLUR = (0.05, 0.25, 0.4, 0.25, 0.05)  # Burt & Adelson 1983, a = 0.4: the filter of the paper
SIGMA = 0.17  # contrast that saturates the division, for images in [0, 1]: the paper's value
EPSILON = 1e-4  # keeps the gradient of the root finite where two bands agree


class NormalisedLaplacianDistance(nn.Module):
    """(B, C, H, W) twice, in [-1, 1] -> (B,): mean over bands of the root mean square difference.

    Bands of octaves: the finest `levels - 1` as far as both sides stay at least 4 pixels, then the low-pass rest.
    """

    kernel: Tensor

    def __init__(self, levels: int = 5) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("kernel", torch.tensor(BLUR, dtype=torch.float64), persistent=False)

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
            b = image.shape[0]
            pair = torch.cat([image.to(dtype), other.to(dtype)]) * 0.5 + 0.5
            # Channels become images: depthwise filters of one channel each.
            pair = pair.flatten(0, 1).unsqueeze(1)
            distances = []
            for band in self._bands(pair):
                normalised = band / (SIGMA + self._blur(band.abs()))
                one, two = normalised.view(2, b, -1)
                distances.append(((one - two).square().mean(1) + EPSILON**2).sqrt() - EPSILON)
            return torch.stack(distances).mean(0)

    def _bands(self, x: Tensor) -> list[Tensor]:
        """[finest, ..., low-pass] of (N, 1, H, W)."""
        bands: list[Tensor] = []
        while len(bands) < self.levels - 1 and min(x.shape[-2:]) >= 4:
            low = self._blur(x, stride=2)
            bands.append(x - self._enlarge(low, x.shape[-2], x.shape[-1]))
            x = low
        return [*bands, x]

    def _blur(self, x: Tensor, stride: int = 1) -> Tensor:
        """Separable 5-tap low pass with mirrored edges (repeated ones where the image is too small to mirror)."""
        kernel = self.kernel.to(x)
        x = F.pad(x, (2, 2, 2, 2), mode="reflect" if min(x.shape[-2:]) > 2 else "replicate")
        x = F.conv2d(x, kernel.view(1, 1, 1, 5), stride=(1, stride))
        return F.conv2d(x, kernel.view(1, 1, 5, 1), stride=(stride, 1))

    def _enlarge(self, x: Tensor, height: int, width: int) -> Tensor:
        """Back to twice the size: bilinear, the smooth interpolation that costs least."""
        return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
