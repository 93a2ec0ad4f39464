"""What each generated image is measured against: the example whose conditions it was given.

Shapes: B batch, H W image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from darkroom.data.derived import DerivedDataset
from darkroom.data.shape_checker import find_objects
from darkroom.data.sources import ImageDataset, ShapesDataset
from darkroom.evaluation.agreement import box_agreement, caption_agreement, map_agreement
from darkroom.evaluation.extractors import PerceptualDistance
from darkroom.evaluation.feature_files import Values
from darkroom.evaluation.metrics import WINDOW, psnr, ssim
from darkroom.evaluation.picture_sources import Check, Example, eight_bits

# By field: the share of images that show what it says, by the pixel rules of `shapes`.
AGREEMENT = {
    "text": "caption agreement",
    "class_label": "class agreement",
    "boxes": "box agreement",
    "segmentation": "map agreement",
}
OVERLAP = {"boxes": "box overlap", "segmentation": "map overlap"}
PAIRED = ("low_resolution", "repaint_mask")  # with these, the example's own picture is what should come out


def is_shapes_set(dataset: ImageDataset) -> bool:
    """Whether the exact checker knows what its examples show."""
    inner = dataset.dataset if isinstance(dataset, DerivedDataset) else dataset
    return isinstance(inner, ShapesDataset)


def shapes_check(fields: Sequence[str], class_names: Sequence[str]) -> Check:
    """Agreement (0 or 1) and overlap of images with what `fields` of their examples say."""

    def check(images: Tensor, examples: Sequence[Example]) -> Values:
        values: Values = {}
        if "text" in fields:
            values[AGREEMENT["text"]] = caption_agreement(images, [e["text"] for e in examples])
        if "class_label" in fields:
            wanted = [class_names[e["class_label"]] for e in examples]
            values[AGREEMENT["class_label"]] = class_agreement(images, wanted)
        for field, judge in (("boxes", box_agreement), ("segmentation", map_agreement)):
            if field in fields:
                found = judge(images, [e[field] for e in examples])
                values |= {AGREEMENT[field]: found.accepted, OVERLAP[field]: found.overlap}
        return values

    return check


def class_agreement(images: Tensor, classes: Sequence[str]) -> Tensor:
    """(B,): 1 where one of the objects in the picture has the shape that was asked for, else 0."""
    found = [[item.shape for item in find_objects(image)] for image in images.numpy()]
    return torch.tensor([float(name in shapes) for name, shapes in zip(classes, found, strict=True)])


def caption_check(name: str, score: Callable[[Tensor, Sequence[str]], Tensor]) -> Check:
    """A score of images (B, H, W, 3) and their captions, under its name."""

    def check(images: Tensor, examples: Sequence[Example]) -> Values:
        return {name: score(images, [example["text"] for example in examples])}

    return check


def pair_check(dataset: ImageDataset, distance: PerceptualDistance) -> Check:
    """PSNR, SSIM and a perceptual distance from the example's own picture."""

    def check(images: Tensor, examples: Sequence[Example]) -> Values:
        wanted = torch.stack([example["image"] for example in examples]).permute(0, 2, 3, 1)
        one, two = (_network(x) for x in (images, eight_bits(wanted, dataset.pixels)))
        values = {"PSNR": psnr(one, two)}
        if min(one.shape[-2:]) >= WINDOW:
            values["SSIM"] = ssim(one, two)
        with torch.no_grad():
            values[distance.name] = distance.distance(one, two).cpu()
        return values

    return check


def _network(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
