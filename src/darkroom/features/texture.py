"""The distance of local textures: how rough two images are at each place and scale, wherever the grain lies.

A mean square error is least where an unsure decoder paints the mean of all that could be there: blur. What it can know
is how rough the place is. Roughness is told here by the variogram of geostatistics (Matheron 1963),

    V_d(p) = mean over the neighbourhood of p of (t(x) - t(x + d))^2,

which holds the same as the local autocovariance (V_d = 2 C(0) - 2 C(d)), for a few steps d. Short steps see fine grain;
the long ones see a repeated pattern, the cheap way of a convolutional decoder to be rough, as the lack of difference
that it is. The textures of an image and of its reconstruction (primed) differ by

    (V - V')^2 / 4 W,    W: V' over a wider neighbourhood, taken as a constant,

which is near (sqrt V - sqrt V')^2, the squared Wasserstein distance between normal distributions of these differences,
in the units of a squared error. Its gradient is in the direction of (V' - V) / 2 W, and W knows of the image only what
the reconstruction does: where a decoder cannot tell how rough a place is, the gradient vanishes at V' = E[V], the mean.
With the image's own roughness as W, the smooth ones among the candidates would count the most, and with the difference
of roots, all of them too little: either leaves reconstructions too smooth.

Shapes: B batch, C channels, H W image size, N planes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.features.laplacian import reduce

# Short steps, and as many long ones: if these counted less, a pattern that repeats itself would meet most of them.
STEPS = (
    *((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (2, 2), (2, -2)),
    *((0, 4), (4, 0), (0, 8), (8, 0), (8, 8), (8, -8), (0, 16), (16, 0)),
)
OCTAVES = 2  # a neighbourhood is a binomial window of about ten pixels
WIDER = 5  # neighbourhoods along a side, in the mean that differences are measured by
EPSILON = 1e-4  # a variance: deviations below 0.01, of images in [-1, 1], hardly count


class TextureDistance(nn.Module):
    """(B, C, H, W) of an image and its reconstruction, in [-1, 1] -> (B,), in float32 at least; 0 for one pixel."""

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
            one, two = (_planes(x.to(dtype)) for x in (image, reconstruction))
            distances = [
                _difference(variogram(one, *step), variogram(two, *step)) for step in STEPS if _fits(step, one)
            ]
            return torch.stack(distances).mean(0) if distances else (image - reconstruction).flatten(1).sum(1) * 0.0


def variogram(t: Tensor, down: int, right: int) -> Tensor:
    """(B, N, H, W) -> (B, N, h, w): the local mean square difference of pixels that lie one step apart."""
    height, width = t.shape[-2:]
    near = t[..., : height - down, max(-right, 0) : width - max(right, 0)]
    far = t[..., down:, max(right, 0) : width - max(-right, 0)]
    local = (far - near).square().flatten(0, 1)
    for _ in range(OCTAVES):
        local = reduce(local)
    return local.unflatten(0, t.shape[:2])


def _planes(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, H, W): brightness, and what each channel is beside it, half as much in all."""
    if image.shape[1] == 1:
        return image
    brightness = image.mean(1, keepdim=True)
    return torch.cat([brightness, (image - brightness) * (0.5 / image.shape[1]) ** 0.5], 1)


def _fits(step: tuple[int, int], t: Tensor) -> bool:
    return step[0] < t.shape[-2] and abs(step[1]) < t.shape[-1]


def _difference(v: Tensor, other: Tensor) -> Tensor:
    """(B, N, h, w) twice, of the image and of the reconstruction -> (B,): summed over planes, mean over places."""
    wider = F.avg_pool2d(other.detach(), WIDER, stride=1, padding=WIDER // 2, count_include_pad=False)
    return ((v - other).square() / (4.0 * (wider + EPSILON))).sum(1).flatten(1).mean(1)
