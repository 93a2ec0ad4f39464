"""SDXL's micro-conditioning: the size that a picture had, where it was cropped, and the size that it got.

Source: Podell et al. 2023, sec. 2.2 and alg. 1. Each number is embedded like a time, 256 wide; all are joined.

Shapes: B batch, K numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from darkroom.conditioning.augmentation import level_embedding
from darkroom.conditioning.encoder import ConditionEncoder, DataFacts, EncoderConfig
from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError

Part = Literal["original_size", "crop", "target_size", "aesthetic_score"]
NUMBERS: dict[str, int] = {"original_size": 2, "crop": 2, "target_size": 2, "aesthetic_score": 1}


@dataclass
class SizesEncoderConfig(EncoderConfig):
    """parts: what the numbers tell, in order; sizes are (height, width), crops (top, left), in pixels. The refiner of
           SDXL has original_size, crop and aesthetic_score
    width: of the embedding of one number
    size:  (width, height) that pictures have where nothing is known of them; null: that of the data
    score: the aesthetic score that is then asked for
    """

    kind: str = "sizes"
    field: str = "sizes"
    drop_rate: float = 0.0
    parts: tuple[Part, ...] = ("original_size", "crop", "target_size")
    width: int = 256
    size: tuple[int, int] | None = None
    score: float = 6.0

    def completed(self, name: str, data: DataFacts) -> Self:
        return self if self.size is not None else replace(self, size=data.size)


class SizesEncoder(ConditionEncoder):
    """Numbers (B, K) -> `vector` (B, K * width). It has no absence: guidance has the same sizes on both sides, those of
    the image that is made unless others are asked for. Data without this field has whole pictures of its own size; with
    `data.sizes` every example tells its own, the random crop included.

    The value of one image is its K numbers, or a dict of the parts by name, as the data gives it."""

    config_class = SizesEncoderConfig

    def __init__(self, config: SizesEncoderConfig) -> None:
        if not config.parts or config.width < 2 or config.width % 2:
            raise DarkroomError(
                f"sizes: {len(config.parts)} parts, width {config.width}; give one part or more and an even width"
            )
        self.count = sum(NUMBERS[part] for part in config.parts)
        super().__init__(config.field, {"vector": self.count * config.width}, config.drop_rate, config.guidance_scale)
        self.config = config

    @property
    def optional(self) -> bool:
        return True

    @property
    def stays(self) -> bool:
        return True

    def encode(self, values: Sequence[Any] | Tensor) -> Conditioning:
        numbers = values if isinstance(values, Tensor) else torch.stack([self._numbers(v) for v in values])
        if numbers.ndim != 2 or numbers.shape[1] != self.count:
            raise DarkroomError(f"sizes: {self._wanted()}, not {list(numbers.shape[1:])}")
        embedded = level_embedding(numbers.flatten(), self.config.width)
        return Conditioning(vector=embedded.reshape(len(numbers), -1))

    def null(self, batch_size: int) -> Conditioning:
        """Those of a whole picture of the config's size."""
        return self.encode(self.from_size(self.config.size or (1024, 1024)).expand(batch_size, -1))

    def from_size(self, size: tuple[int, int]) -> Tensor:
        """(K,): of a picture that always had this (width, height)."""
        return self._numbers(_whole(size))

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> Tensor:
        """What a dict leaves out is that of the whole image."""
        return self._numbers({**_whole(size), **value} if isinstance(value, Mapping) else value)

    def record(self, field: str, value: Any) -> list[float]:
        return [float(number) for number in value]

    def several(self, value: Any) -> bool:
        """A list of lists or of dicts; one list of numbers is for all images."""
        return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (list, tuple, Tensor, Mapping))

    def _numbers(self, value: Any) -> Tensor:
        if isinstance(value, Mapping):
            known = {"aesthetic_score": self.config.score, **value}
            if set(known) - set(NUMBERS) or not set(self.config.parts) <= set(known):
                raise DarkroomError(f"sizes: {self._wanted()}, not {', '.join(map(str, value)) or 'nothing'}")
            pairs = [known[part] for part in self.config.parts]
            value = [n for pair in pairs for n in (pair if isinstance(pair, (list, tuple)) else [pair])]
        try:
            numbers = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError):
            numbers = torch.empty(0)
        if numbers.shape != (self.count,) or not bool(torch.isfinite(numbers).all()):
            raise DarkroomError(f"sizes: {self._wanted()}, not {value!r}")
        return numbers

    def _wanted(self) -> str:
        return f"give {self.count} numbers: {', '.join(self.config.parts)}"


def _whole(size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Of a picture that always had this (width, height)."""
    return {"original_size": (size[1], size[0]), "crop": (0, 0), "target_size": (size[1], size[0])}
