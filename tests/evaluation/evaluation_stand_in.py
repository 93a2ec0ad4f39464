"""A perceptual network and data sets small enough for tests; what they say need only be the same twice."""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom.data.sources import DataConfig, ImageDataset, open_dataset
from darkroom.evaluation.extractors import Embedding, PerceptualDistance


def stand_in() -> tuple[PerceptualDistance, Embedding]:
    """Differences of small images, and their 4x4 means."""

    def embed(image: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(image.mean(1, keepdim=True), 4).flatten(1)

    def distance(image: Tensor, other: Tensor) -> Tensor:
        return (embed(image) - embed(other)).square().mean(1)

    return PerceptualDistance("perceptual-stand-in", distance, "0" * 64), Embedding("stand-in", embed, "0" * 64)


def shapes(count: int = 10, size: int = 32, kind: str = "shapes") -> ImageDataset:
    return open_dataset(DataConfig(source=kind, size=size, count=count))
