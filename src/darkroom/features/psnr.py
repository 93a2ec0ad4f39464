"""Peak signal-to-noise ratio: what training reports and what scores are made of is one number."""

from __future__ import annotations

import torch
from torch import Tensor

DATA_RANGE = 2.0  # of images in [-1, 1]
LEAST_MSE = 1e-10  # images that are equal have 106 dB instead of infinitely many


def psnr(image: Tensor, other: Tensor) -> Tensor:
    """(B, C, H, W) twice, in [-1, 1] -> (B,) float64: 10 log10(4 / mean (x - y)^2) in dB, the mean over channels and
    pixels. Raises ValueError for other shapes."""
    check_pair(image, other)
    error = (image.double() - other.double()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(DATA_RANGE**2 / error.clamp_min(LEAST_MSE))


def check_pair(image: Tensor, other: Tensor) -> None:
    """Raises ValueError unless both are batches of images of one shape."""
    if image.shape != other.shape or image.ndim != 4:
        raise ValueError(
            f"expected two batches of images (B, C, H, W), got {tuple(image.shape)} and {tuple(other.shape)}"
        )
