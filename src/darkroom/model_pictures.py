"""Pictures as users have them, before and after a model: what `upscale` and `edit` have in common.

Shapes: C channels of the picture, H W its size; a model has channels of its own.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from darkroom.data.resizing import bicubic
from darkroom.errors import DarkroomError
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load
from darkroom.pixel_format import PixelFormat

SettingsT = TypeVar("SettingsT")


def open_whole_model(model: LatentDiffusion | str, device: str, needed: str) -> LatentDiffusion:
    """The model itself, or the one of that name. needed: what the caller is after, in the message for a first stage
    alone."""
    loaded = load(model, device=device) if isinstance(model, str) else model
    if not isinstance(loaded, LatentDiffusion):
        raise DarkroomError(f"{model} is a first stage alone; give a whole model that {needed}")
    return loaded


def settings_from(kind: type[SettingsT], given: dict[str, Any], function: str) -> SettingsT:
    """Keyword arguments of `function` -> its settings; a name that there is not is told with those that there are."""
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if unknown := [name for name in given if name not in known]:
        raise DarkroomError(f"{function} has no setting {unknown[0]!r} (known: {', '.join(known)})")
    return kind(**given)


def checked_picture(image: np.ndarray, model: LatentDiffusion) -> tuple[np.ndarray, PixelFormat]:
    """(H, W) or (H, W, C) -> (H, W, C), and what its numbers mean. Raises DarkroomError for what is no picture of this
    model: it has the model's channels or is grey, and its type, or 8 or 16 bits in place of the other."""
    if not isinstance(image, np.ndarray):
        raise DarkroomError(
            f"the picture is a {type(image).__name__}; give an array, such as numpy.asarray(PIL.Image.open(path))"
        )
    values = image[..., None] if image.ndim == 2 else image
    if values.ndim != 3 or 0 in values.shape:
        raise DarkroomError(f"an array of shape {image.shape} is not a picture; give (H, W) or (H, W, C)")
    pixels = model.pixels.for_picture(str(values.dtype))
    channels, wanted = values.shape[2], model.image_channels
    if channels not in (1, wanted):
        raise DarkroomError(
            f"the picture has {channels} channels, the model works on {wanted}; convert it, or take another model"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DarkroomError("the picture holds values that are not finite (NaN or infinity); replace them")
    return values, pixels


def to_network(values: np.ndarray, pixels: PixelFormat, channels: int) -> Tensor:
    """(H, W, C) -> (channels, H, W) in [-1, 1]; grey is repeated."""
    network = pixels.to_network(torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C")))
    return network.expand(channels, -1, -1)


def grey_again(image: Tensor, channels: int) -> Tensor:
    """What a model of colours (its channels, H, W) made of a grey picture: (1, H, W) if `channels` is 1."""
    return image.mean(0, keepdim=True) if channels == 1 < image.shape[0] else image


def from_network(image: Tensor, pixels: PixelFormat, channels: int) -> np.ndarray:
    """(channels of the model, H, W) in [-1, 1] -> (H, W, channels) in the numbers of the picture."""
    return pixels.from_network(grey_again(image, channels)).permute(1, 2, 0).contiguous().numpy()


def resized_alpha(alpha: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(H, W, 1) of an integer type or float32 -> (*size, 1): opacity by bicubic, within what it was."""
    values = torch.from_numpy(alpha[..., 0].astype(np.float32))[None]
    resized = bicubic(values, (size[0], size[1])).clamp(values.min(), values.max())[0].numpy()
    return (np.rint(resized) if alpha.dtype.kind in "iu" else resized).astype(alpha.dtype)[..., None]
