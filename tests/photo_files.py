"""Photos of every kind that people have, made for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageCms

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# The mode of a file, its channels, and the mode in which a result is written.
MODES = [("L", 1, "L"), ("LA", 2, "LA"), ("RGBA", 4, "RGBA"), ("CMYK", 4, "RGB"), ("P", 1, "RGB"), ("1", 1, "L")]


def numbers(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def save_mode(mode: str, height: int, width: int, channels: int) -> str:
    """Writes a photo of that mode; gives its name."""
    values = numbers((height, width, channels))
    if mode in ("P", "1"):
        picture = Image.fromarray(values[..., 0]).convert(mode)
        if mode == "P":
            picture.putpalette(bytes(range(256)) * 3)
    else:
        picture = Image.fromarray(values[..., 0] if channels == 1 else values, mode)
    name = "a.tif" if mode == "CMYK" else "a.png"
    picture.save(name)
    return name
