"""Which networks look at the pictures, and what the scores made with them are called.

LPIPS and FID are names of exact weights. Scores made with other weights carry another name: those made with the
bundled perceptual network are `perceptual-darkroom` and `FD-darkroom`.
Shapes: B batch, C channels, H W image size, D width of an embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from darkroom.features.lpips import LINEAR_FILE, VGG_FILE, load_lpips, lpips_available, weights_folder
from darkroom.features.perceptual import load_perceptual


@dataclass(frozen=True)
class PerceptualDistance:
    """`distance(image, other)`: (B, C, H, W) twice, in [-1, 1] -> (B,). `weights`: SHA-256 of what it looked with."""

    name: str
    distance: Callable[[Tensor, Tensor], Tensor]
    weights: str


@dataclass(frozen=True)
class Embedding:
    """`embed(image)`: (B, C, H, W) in [-1, 1] -> (B, D). `name` goes behind FD- and rFD-."""

    name: str
    embed: Callable[[Tensor], Tensor]
    weights: str


def default_extractors(device: torch.device, channels: int = 3) -> tuple[PerceptualDistance, Embedding]:
    """LPIPS where its published files are (for 1 and 3 channels), else our own distance; always our own embedding."""
    own = load_perceptual().to(device)
    embedding = Embedding("darkroom", own.embed, own.sha256)
    if channels in (1, 3) and lpips_available():
        lpips: nn.Module = load_lpips().to(device)
        return PerceptualDistance("LPIPS", lpips, _digest_of_files()), embedding
    return PerceptualDistance("perceptual-darkroom", own, own.sha256), embedding


def _digest_of_files() -> str:
    digest = hashlib.sha256()
    for name in (VGG_FILE, LINEAR_FILE):
        digest.update((weights_folder() / name).read_bytes())
    return digest.hexdigest()
