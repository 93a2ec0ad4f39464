"""An image through a first stage and back, in its own type and size."""

from __future__ import annotations

import numpy as np
import torch

from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.tiling import Tile


def reconstruct(first_stage: FirstStage, image: np.ndarray, tile: Tile = "auto") -> np.ndarray:
    """(H, W), or (H, W, C) -> an array of the same shape and type, as the first stage gives it back.

    The image is of the first stage's own pixel type and channels; any size. The latent is the posterior's mode.
    tile: as for `FirstStage.encode`.
    """
    pixels, channels = first_stage.pixels, first_stage.image_channels
    values = image[..., None] if image.ndim == 2 else image
    if values.ndim != 3 or 0 in values.shape:
        raise DarkroomError(f"an array of shape {image.shape} is not an image; give (H, W) or (H, W, C)")
    if (values.shape[2], str(values.dtype)) != (channels, pixels.dtype):
        raise DarkroomError(
            f"the image has {sample_kind(values.shape[2], str(values.dtype))}, the model takes "
            f"{sample_kind(channels, pixels.dtype)}; convert the image, or take another model"
        )
    if not np.isfinite(values).all():
        raise DarkroomError("the image holds values that are not finite (NaN or infinity); replace them by numbers")
    device = next(iter(first_stage.state_dict().values())).device
    numbers = torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C"))[None]
    with torch.inference_mode():
        network = pixels.to_network(numbers).to(device)
        latent = first_stage.encode(network, tile=tile).mode()
        decoded = first_stage.decode(latent, tile=tile, size=(values.shape[1], values.shape[0]))
    if not bool(decoded.isfinite().all()):
        raise DarkroomError("the reconstruction is not finite; use float32 weights, or another checkpoint of the model")
    return pixels.from_network(decoded)[0].permute(1, 2, 0).contiguous().cpu().numpy().reshape(image.shape)


def psnr(image: np.ndarray, other: np.ndarray, value_range: float) -> float:
    """10*log10(range^2 / mean squared difference), dB; infinite for equal images."""
    error = float(np.mean((image.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(value_range**2 / error))


def sample_kind(channels: int, dtype: str) -> str:
    """For messages: "1 channel of uint16"."""
    return f"{channels} channel{'s' * (channels > 1)} of {dtype}"
