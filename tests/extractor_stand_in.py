"""An extractor that takes no time: its scores need only be the same twice."""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom.evaluation.extractors import Extractor, Features

WIDTH = 8


def quick_extractor(scale: float = 1.0, has_classes: bool = False) -> Extractor:
    """Means of four quarters of grey and of colour."""

    def look(images: Tensor) -> Features:
        x = images.permute(0, 3, 1, 2).float() / 255
        grey = torch.nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)
        colour = torch.nn.functional.adaptive_avg_pool2d(x[:, :1] - x[:, 2:], 2).flatten(1)
        embedding = torch.cat([grey, colour], 1) * scale
        return Features(embedding, torch.softmax(8 * embedding, 1) if has_classes else None)

    return Extractor("stand-in", "FD-stand-in", "KD-stand-in", WIDTH, "none", "0" * 64, has_classes, look)
