"""What the numbers in an image file mean: their type, and which of them are -1 and 1 for the network.

    network = 2*(value - low)/(high - low) - 1          values outside [low, high] are clipped to it, in and out

A model keeps its format, so that a 16-bit image comes back as a 16-bit image and a temperature as a temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from darkroom.errors import DarkroomError

PixelType = Literal["uint8", "uint16", "float32"]
LIMITS = {"uint8": 255, "uint16": 65535}
_TORCH = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}


@dataclass(frozen=True)
class PixelFormat:
    """dtype: type of the numbers in files; low, high: the values that are -1 and 1 for the network."""

    dtype: PixelType = "uint8"
    low: float = 0.0
    high: float = 255.0

    def __post_init__(self) -> None:
        if self.dtype not in get_args(PixelType):
            raise DarkroomError(f'pixel type "{self.dtype}" is not known; use {", ".join(get_args(PixelType))}')
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise DarkroomError(
                f"the value range is {self.low:g} to {self.high:g}: give two finite numbers, the lower one first"
            )
        most = LIMITS.get(self.dtype)
        if most is not None and not 0 <= self.low < self.high <= most:
            raise DarkroomError(
                f"the value range {self.low:g} to {self.high:g} does not fit {self.dtype}, which holds 0 to {most}; "
                "correct the range, or use float32"
            )

    @classmethod
    def of(cls, dtype: PixelType, value_range: tuple[float, float] | None = None) -> PixelFormat:
        """The whole range of an integer type, unless another is given. float32 has no range of its own."""
        if value_range is None:
            if dtype not in LIMITS:
                raise DarkroomError(
                    f"{dtype} pixels have no range of their own: give the values that are black and white"
                )
            value_range = (0.0, float(LIMITS[dtype]))
        return cls(dtype, float(value_range[0]), float(value_range[1]))

    def for_picture(self, dtype: str) -> PixelFormat:
        """What the numbers of a picture of this type mean to a model of this format: 8 and 16 bits are alike where the
        model has the whole range of either."""
        if dtype == self.dtype:
            return self
        if dtype in LIMITS and self.dtype in LIMITS and self == PixelFormat.of(self.dtype):
            return PixelFormat.of(dtype)  # type: ignore[arg-type]
        raise DarkroomError(
            f"the picture has {dtype} numbers, the model was trained with {self}; convert it, or take another model"
        )

    @property
    def bits(self) -> int:
        return {"uint8": 8, "uint16": 16, "float32": 32}[self.dtype]

    def to_network(self, values: Tensor) -> Tensor:
        """Numbers of a file, any shape -> float32 in [-1, 1]."""
        network = values.float()
        if self.low:
            network = network - self.low
        network = network / ((self.high - self.low) / 2) - 1
        return network.clamp_(-1, 1) if self._can_exceed else network

    def from_network(self, image: Tensor) -> Tensor:
        """float, any shape -> numbers of this format: clipped to the range, integers rounded to the nearest."""
        values = (image.float().clamp(-1, 1) + 1) * ((self.high - self.low) / 2)
        if self.low:
            values = values + self.low
        if self.dtype == "float32":
            return values.clamp_(self.low, self.high)
        return values.round_().clamp_(0, LIMITS[self.dtype]).to(_TORCH[self.dtype])

    @property
    def _can_exceed(self) -> bool:
        return (self.low, self.high) != (0, LIMITS.get(self.dtype))

    def __str__(self) -> str:
        """For people: "16 bits, 0 to 65535"."""
        kind = f"{self.bits} bits" if self.dtype in LIMITS else "floating point"
        return f"{kind}, {self.low:g} to {self.high:g}"

    def to_dict(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "low": self.low, "high": self.high}
