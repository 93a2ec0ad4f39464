"""A photo with everything that belongs to it: colour at full depth, opacity, colour profile; in and out.

Pictures for training go by the rule of `transforms`, which makes all of them alike; a photo that someone gets back
keeps its own kind. Shapes: H W image size, C colour channels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from darkroom.data.image_files import image_bytes, read_samples, tiff_facts, write_image_file
from darkroom.data.io import explaining

_SPACES = {1: b"GRAY", 3: b"RGB "}  # what a profile's header calls them, by the number of colour channels


@dataclass(frozen=True)
class Photograph:
    """values: (H, W, C) upright, in the type of the file; alpha: (H, W, 1) of that type, or None; profile: the ICC
    profile of these colours, or None; frames: how many the file has, of which this is the first."""

    values: np.ndarray
    alpha: np.ndarray | None = None
    profile: bytes | None = None
    frames: int = 1


def read_photograph(path: str | Path) -> Photograph:
    """Raises DarkroomError, one line with the cure, for what is no picture."""
    path = Path(path).expanduser()
    with explaining(path):
        data = path.read_bytes()
        samples = read_samples(data)
        values = samples.values
        if values.dtype.kind in "iu" and values.dtype.itemsize > 2 and values.min() >= 0 and values.max() <= 65535:
            values = values.astype(np.uint16)  # what Pillow may make of 16-bit grey
        if str(values.dtype) not in ("uint8", "uint16", "float32"):
            raise ValueError(f"holds {values.dtype} numbers; convert it to 8 or 16 bits")
        alpha = values[..., -1:] if samples.alpha else None
        colour = values[..., :-1] if samples.alpha else values
        profile, frames = _facts(data)
        space = _SPACES.get(colour.shape[2])
        fits = profile is not None and space is not None and profile[16:20] == space
        return Photograph(colour, alpha, profile if fits else None, frames)


def _facts(data: bytes) -> tuple[bytes | None, int]:
    """ICC profile and number of frames of what Pillow knows, and of TIFF."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            profile = picture.info.get("icc_profile")
            return (profile if isinstance(profile, bytes) else None), int(getattr(picture, "n_frames", 1))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return tiff_facts(data) if data[:2] in (b"II", b"MM") else (None, 1)


def photograph_bytes(photo: Photograph, suffix: str, text: Mapping[str, str] | None = None) -> bytes:
    """File content with the opacity as last channel. The profile is kept in PNG and TIFF."""
    values = photo.values if photo.alpha is None else np.concatenate([photo.values, photo.alpha], 2)
    return image_bytes(values, suffix, text, photo.alpha is not None, photo.profile)


def save_photograph(path: Path, photo: Photograph, text: Mapping[str, str] | None = None) -> None:
    """Write a photo atomically in the type that the name says, with notes by keyword."""
    write_image_file(path, photograph_bytes(photo, path.suffix.lower(), text), text)
