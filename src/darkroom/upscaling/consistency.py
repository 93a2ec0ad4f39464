"""Low-frequency consistency: an enlarged picture that, made smaller again, is the picture it was made of.

    |D(image) - small| < 1/2 everywhere, D antialiased bicubic   =>   round(D(image)) = small, value for value

Back-projection (Irani & Peleg 1991): what is missing between the small picture and the image made smaller is enlarged
and added, within the range of the file's numbers. Bicubic enlarging is the transpose of D times the factor squared, so
that this is gradient descent on |D(image) - small|^2, and Nesterov's momentum with restarts makes it several times
faster. Then the image is rounded, which moves D(image) by a few tenths, and the places where that is too much are
corrected and rounded again; elsewhere nothing moves, or the rounding would be drawn anew everywhere.

A small picture with contrasts that no bicubic one has (a white pixel on black) has no such image; then the loops end
after `MOST` rounds, and what is left is told. Shapes: C channels, H W image, h w small picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from darkroom.data.resizing import bicubic

MOST = 150
ENOUGH = 0.1  # that may be missing before the rounding
BOUND = 0.499  # of the half that rounding forgives, less what float32 may lose
ALMOST = 0.45  # what is missing less than this is not touched after the rounding


def consistent(image: Tensor, small: Tensor, low: float, high: float, whole: bool = True) -> tuple[Tensor, float]:
    """image (C, H, W), small (C, h, w), float32 in the numbers of the file, within [low, high] -> the corrected image
    and the greatest difference that is left between `small` and the corrected image made smaller, before rounding.

    whole: the numbers are integers, and so are those of the result; else the difference becomes a 2^16th of the range.
    """
    stored = image.clamp(low, high).round()
    if whole and (difference := float(_missing(stored, small).abs().max())) < BOUND:
        return stored, difference
    image = _projected(image, small, low, high, ENOUGH if whole else (high - low) / 2**16)
    if not whole:
        return image, float(_missing(image, small).abs().max())
    best, least = image, math.inf
    for _ in range(MOST):
        stored = image.round()
        missing = _missing(stored, small)
        difference = float(missing.abs().max())
        if difference < least:
            best, least = stored, difference
        if difference < BOUND:
            break
        image = _step(image, torch.where(missing.abs() > ALMOST, missing, 0.0), low, high)
    return best, least


def smaller(image: Tensor, size: tuple[int, int]) -> Tensor:
    """D: bicubic, within the range of the image, as `data.degradations` makes small pictures; (C, H, W) -> (C, h, w)"""
    return bicubic(image, size).clamp(image.min(), image.max())


def _projected(image: Tensor, small: Tensor, low: float, high: float, enough: float) -> Tensor:
    """An image near the given one from which at most `enough` is missing anywhere (not rounded)."""
    image = before = image.clamp(low, high)
    momentum = 1.0
    for _ in range(MOST):
        missing = _missing(image, small)
        if float(missing.abs().max()) < enough:
            break
        following = _step(image, missing, low, high)
        if float(((image - following) * (following - before)).sum()) > 0:  # it went too far: begin anew from here
            momentum = 1.0
        longer = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        image = following + (momentum - 1) / longer * (following - before)
        before, momentum = following, longer
    return image.clamp(low, high)


def _missing(image: Tensor, small: Tensor) -> Tensor:
    return small - smaller(image, (small.shape[1], small.shape[2]))


def _step(image: Tensor, missing: Tensor, low: float, high: float) -> Tensor:
    return (image + bicubic(missing, (image.shape[1], image.shape[2]))).clamp(low, high)
