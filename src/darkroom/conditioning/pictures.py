"""Pictures, masks and maps that someone gives for one image, as the data would give them.

Accepted: NumPy arrays and tensors, of integers (all that the type holds) or of floats.
Shapes: C channels, H W image size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.errors import DarkroomError


def as_image(name: str, value: Any, size: tuple[int, int] | None, channels: int) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) -> float32 (C, H, W) in [-1, 1].

    Integers are spread over [-1, 1]; floats are that already. size: (width, height) that it must have.
    """
    numbers = _numbers(name, value)
    if numbers.ndim == 2:
        numbers = numbers[None]
    elif numbers.ndim == 3 and numbers.shape[-1] == channels and numbers.shape[0] != channels:
        numbers = numbers.permute(2, 0, 1)
    if numbers.ndim != 3 or numbers.shape[0] != channels:
        raise DarkroomError(f"{name}: shape {tuple(numbers.shape)} is no picture of {channels} channels")
    if size is not None and (numbers.shape[2], numbers.shape[1]) != size:
        raise DarkroomError(
            f"{name} is {numbers.shape[2]}x{numbers.shape[1]}, it must be {size[0]}x{size[1]} for this image; resize it"
        )
    if numbers.dtype.is_floating_point:
        return numbers.float()
    return numbers.float() * (2 / _greatest(value)) - 1


def as_mask(name: str, value: Any, size: tuple[int, int]) -> Tensor:
    """(H, W), perhaps with an axis of one channel -> float32 (1, H, W), 1 = repaint: from half of the greatest value
    that the type holds (floats: 1) upwards."""
    numbers = _plane(name, value, size)
    limit = 1.0 if numbers.dtype.is_floating_point or numbers.dtype == torch.bool else _greatest(value)
    return (numbers.float() >= limit / 2).float()


def as_depth(name: str, value: Any, size: tuple[int, int]) -> Tensor:
    """(H, W) -> float32 (1, H, W), larger = nearer, in any unit."""
    numbers = _plane(name, value, size).float()
    if not bool(torch.isfinite(numbers).all()):
        raise DarkroomError(f"{name} holds values that are not finite; replace them by numbers")
    return numbers


def as_labels(name: str, value: Any, size: tuple[int, int], count: int) -> Tensor:
    """(H, W) integers -> int64 (H, W) of ids below count; 255 stands for no label."""
    numbers = _plane(name, value, size)[0]
    if numbers.dtype.is_floating_point:
        kind = str(numbers.dtype).removeprefix("torch.")
        raise DarkroomError(f"{name} holds {kind}; give whole numbers, one class id per pixel")
    labels = numbers.long()
    known = labels[labels != 255]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < count:
        wrong = int(known.max()) if int(known.max()) >= count else int(known.min())
        raise DarkroomError(f"{name} has the id {wrong}; this model knows 0 to {count - 1}, and 255 for no label")
    return labels


def _numbers(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise DarkroomError(f"{name}: give an array or a tensor, not {type(value).__name__}")
    if value.dtype == np.uint16:  # torch computes little with it
        value = value.astype(np.int32)
    return torch.from_numpy(np.ascontiguousarray(value))


def _plane(name: str, value: Any, size: tuple[int, int]) -> Tensor:
    """(1, H, W) at (width, height): nearest neighbours where the picture is larger or smaller, of the same shape."""
    numbers = _numbers(name, value)
    if numbers.ndim == 3 and 1 in (numbers.shape[0], numbers.shape[-1]):
        numbers = numbers[0] if numbers.shape[0] == 1 else numbers[..., 0]
    if numbers.ndim != 2:
        raise DarkroomError(f"{name}: shape {tuple(numbers.shape)} is no map of one channel")
    width, height = size
    if numbers.shape == (height, width):
        return numbers[None]
    if numbers.shape[0] * width != numbers.shape[1] * height:
        shape = f"{numbers.shape[1]}x{numbers.shape[0]}"
        raise DarkroomError(f"{name} is {shape}, the image {width}x{height}: give both one shape, or set the size")
    whole = F.interpolate(numbers[None, None].double(), size=(height, width), mode="nearest-exact")[0]
    return whole.to(numbers.dtype)


def _greatest(value: Any) -> float:
    """The greatest value of an array's or tensor's integer type."""
    dtype = value.dtype
    return float(torch.iinfo(dtype).max if isinstance(dtype, torch.dtype) else np.iinfo(dtype).max)
