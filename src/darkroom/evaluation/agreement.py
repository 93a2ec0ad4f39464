"""Does a picture show what was asked for? One number per picture, so that means and intervals are the caller's.

Captions, boxes and label maps are those of the set `shapes`, whose pixels can be judged by fixed rules
(`data/shape_checker.py`, `data/shape_layout.py`). Pictures are uint8 (B, H, W, 3).
Shapes: B pictures, H W size, D width of an embedding, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from darkroom.data.shape_checker import check_caption
from darkroom.data.shape_layout import LayoutResult, check_boxes, check_segmentation


class Agreement(NamedTuple):
    """Of each of B pictures, float64: `accepted` 1 where everything is as asked, else 0; `overlap`, the mean
    intersection over union of what was asked, 0 for what is missing."""

    accepted: Tensor
    overlap: Tensor


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """(B, D) embeddings of pictures and of their texts -> (B,) float64: 100 max(cos, 0) (Hessel et al. 2021, eq. 1,
    with the factor 100 that libraries use in the place of its 2.5)."""
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(f"expected embeddings (B, D) twice, got {tuple(images.shape)} and {tuple(texts.shape)}")
    cosine = torch.cosine_similarity(images.double(), texts.double(), dim=1, eps=1e-12)
    return 100.0 * cosine.clamp_min(0.0)


def class_hits(scores: Tensor, labels: Tensor, *, top: int = 1) -> Tensor:
    """(B, K) logits or probabilities, (B,) labels -> (B,) float64: 1 where the label is among the `top` highest.

    Their mean is the class accuracy. A label shares its place with classes of the very same score, and then counts only
    if all of them fit: a classifier that says the same of every class is right about none.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not 1 <= top <= scores.shape[1]:
        raise ValueError(f"top {top} of scores {tuple(scores.shape)} for labels {tuple(labels.shape)}")
    own = scores.gather(1, labels[:, None].long())
    return ((scores >= own).sum(1) <= top).double()


def caption_agreement(images: Tensor, captions: Sequence[str]) -> Tensor:
    """(B,) float64: 1 where a picture shows exactly what its caption in the language of `shapes` says, else 0."""
    verdicts = [bool(check_caption(picture, text)) for picture, text in zip(images.numpy(), captions, strict=True)]
    return torch.tensor(verdicts, dtype=torch.float64)


def box_agreement(images: Tensor, boxes: Sequence[np.ndarray | Tensor]) -> Agreement:
    """boxes: of each picture (n, 5) class, x0, y0, x1, y1, normalised. Accepted by the rule of object detection: as
    many objects as boxes, and each box has one of its class that overlaps it by half."""
    pairs = zip(images.numpy(), boxes, strict=True)
    return _agreement([check_boxes(picture, np.asarray(asked)) for picture, asked in pairs])


def map_agreement(images: Tensor, maps: Sequence[np.ndarray | Tensor] | Tensor) -> Agreement:
    """maps: of each picture (H, W) labels, 0 the background. The overlap is the mean over labels, mIoU of one picture;
    accepted where each label overlaps by half."""
    pairs = zip(images.numpy(), maps, strict=True)
    return _agreement([check_segmentation(picture, np.asarray(asked)) for picture, asked in pairs])


def _agreement(results: list[LayoutResult]) -> Agreement:
    accepted = torch.tensor([bool(result) for result in results], dtype=torch.float64)
    return Agreement(accepted, torch.tensor([result.overlap for result in results], dtype=torch.float64))
