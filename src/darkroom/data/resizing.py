"""Bicubic resizing as SR3 and the paper make their small pictures: Keys' kernel with a = -1/2, stretched by the factor
when a picture shrinks (antialiasing), with weights that are brought to sum 1 where the picture ends.

That is Pillow's BICUBIC and the antialiased bicubic of TensorFlow. MATLAB's imresize has the same kernel and differs at
the border alone, where it mirrors the picture. OpenCV's has a = -3/4 and no antialiasing: another one.
Pillow rounds uint8 after each axis; here nothing is rounded in between. Shapes: C channels, H W image size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) of a floating-point type -> (..., H', W'); may leave the range of the picture's own values."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    flat = image.reshape(1, -1, *image.shape[-2:])
    return F.interpolate(flat, size=size, mode="bicubic", antialias=True).reshape(*image.shape[:-2], *size)
