"""The one rule by which a picture becomes what the network sees, and the augmentations of a batch.

Shapes: C channels, H W image size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from darkroom.errors import DarkroomError

RULE = """\
1. Rotate and mirror as the EXIF orientation says.
2. Samples of 16 bits are scaled by 255/65535 and rounded to 8. Palettes are resolved; CMYK, YCbCr, Lab become RGB.
3. Transparent pictures are composited over the background colour.
4. channels=3: grey is replicated. channels=1: colour becomes luma (ITU-R 601).
5. The largest centred rectangle with the target's aspect ratio is kept.
6. That rectangle is resized to the target with a Lanczos filter, also when it grows.
Label maps take steps 1, 5 and 6 with nearest neighbour. Boxes take step 5, are clipped, and are dropped when nothing is
left of them.
"""
# Part of every cache key. Raise it when a step above changes.
RULE_VERSION = 1


def to_eight_bits(image: Image.Image, channels: int = 3, background: str = "white") -> Image.Image:
    """Steps 1 to 4 of RULE: mode RGB (channels=3) or L (channels=1)."""
    if channels not in (1, 3):
        raise DarkroomError(f"channels={channels} is not possible for picture files; use 1 or 3")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # I;16 and friends; Pillow reads 16-bit grey PNG as I or I;16
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError("integer samples outside 0..65535")
        image = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point samples have no stated range")
    if image.mode in ("LA", "La", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        under = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(under, image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def crop_box(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Step 5 of RULE: (x0, y0, x1, y1) in pixels of a (width, height) picture for a (width, height) target."""
    width, height = image_size
    scale = min(width / size[0], height / size[1])
    w, h = size[0] * scale, size[1] * scale
    return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)


def to_network(image: Image.Image, size: tuple[int, int], channels: int = 3, background: str = "white") -> np.ndarray:
    """The whole RULE: uint8 (C, H, W) for a target of (width, height)."""
    image = to_eight_bits(image, channels, background)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS, box=crop_box(image.size, size))
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def labels_to_network(labels: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """RULE for a label map: uint8 (H, W)."""
    labels = ImageOps.exif_transpose(labels)
    if labels.mode not in ("L", "P"):
        raise ValueError(f"label map of mode {labels.mode}; expected one 8-bit channel of class ids")
    if labels.mode == "P":  # the ids are the palette positions, not the colours
        labels = Image.fromarray(np.asarray(labels))
    if labels.size != size:
        labels = labels.resize(size, Image.Resampling.NEAREST, box=crop_box(labels.size, size))
    return np.array(labels, np.uint8)


def crop_boxes(boxes: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Boxes (n, 5) of class, x0, y0, x1, y1 as seen in the part `box` (normalised x0, y0, x1, y1) of the picture."""
    if not len(boxes):
        return boxes
    x0, y0, x1, y1 = box
    out = boxes.astype(np.float32, copy=True)
    out[:, 1::2] = np.clip((out[:, 1::2] - x0) / (x1 - x0), 0, 1)
    out[:, 2::2] = np.clip((out[:, 2::2] - y0) / (y1 - y0), 0, 1)
    return out[(out[:, 3] > out[:, 1]) & (out[:, 4] > out[:, 2])]


def flip_example(example: dict[str, Any]) -> dict[str, Any]:
    """The example mirrored left to right: image, label map and boxes. Its text stays."""
    out = dict(example)
    for field in ("image", "segmentation"):
        if field in out:
            out[field] = torch.flip(out[field], [-1])
    if "boxes" in out:
        boxes = out["boxes"].clone()
        boxes[:, 1], boxes[:, 3] = 1 - out["boxes"][:, 3], 1 - out["boxes"][:, 1]
        out["boxes"] = boxes
    return out


def crop_example(example: dict[str, Any], x: int, y: int, width: int, height: int) -> dict[str, Any]:
    """The rectangle with the top left pixel (x, y): image, label map and boxes. Its text and class stay."""
    out = dict(example)
    full_height, full_width = example["image"].shape[-2:]
    for field in ("image", "segmentation"):
        if field in out:
            out[field] = out[field][..., y : y + height, x : x + width]
    if "boxes" in out:
        part = (x / full_width, y / full_height, (x + width) / full_width, (y + height) / full_height)
        out["boxes"] = torch.from_numpy(crop_boxes(out["boxes"].numpy(), part))
    return out
