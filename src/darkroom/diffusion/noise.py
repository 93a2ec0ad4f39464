"""Noise that belongs to an image, not to a batch.

Shapes: B batch, C channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """`noise(i)`: the i-th standard normal draw of every image, (B, C, H, W).

    Each image has its own CPU generator seeded with the image's seed and draws in float32, in order. So image k depends
    on seed k alone, whatever the batch it is made in and the device it is moved to. Draws may be asked for in any
    order.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.seeds, self.shape, self.device = list(seeds), shape, device
        self._generators = [torch.Generator().manual_seed(s) for s in self.seeds]
        self._next = 0

    def __call__(self, i: int) -> Tensor:
        if i < self._next:
            for generator, seed in zip(self._generators, self.seeds, strict=True):
                generator.manual_seed(seed)
            self._next = 0
        while True:
            draws = [torch.randn(self.shape, generator=g) for g in self._generators]
            self._next += 1
            if self._next > i:
                return torch.stack(draws).to(self.device)
