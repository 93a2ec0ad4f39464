"""What may stand under a mask before a network has painted there.

Shapes: B batch, C channels, H W image size. Masks: 1 = not known.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def filled(image: Tensor, mask: Tensor) -> Tensor:
    """(B, C, H, W) with what is under the mask (B, 1, H, W) continued smoothly from what surrounds it.

    Push-pull (Gortler et al. 1996, sec. 3.4): unknown pixels take the colour of a picture of half the size, in which
    every pixel is the mean of the known ones among its four; and so on until all are known. Nothing known: 0.
    """
    known = (mask < 0.5).to(image)
    return _filled(image * known, known)


def _filled(image: Tensor, known: Tensor) -> Tensor:
    """image is 0 where known (B, 1, H, W) is 0."""
    if bool((known > 0).all()) or max(image.shape[2:]) == 1:
        return image
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    mean = F.avg_pool2d(image, 2, ceil_mode=True) / share.clamp(min=1e-6)
    seen = (share > 0).to(image)
    coarse = _filled(mean * seen, seen)
    smooth = F.interpolate(coarse, size=image.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(known > 0, image, smooth)
