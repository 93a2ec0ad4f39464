"""Bare numbers as conditions: an integer without a name, and a vector such as the embedding of a picture.

Shapes: B batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from darkroom.conditioning.augmentation import (
    EMBEDDING_NOISE,
    LEVELS,
    Noised,
    check_level,
    draw_noise,
    level_embedding,
    with_noise,
)
from darkroom.conditioning.encoder import ConditionEncoder, EncoderConfig
from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError


@dataclass
class LabelEncoderConfig(EncoderConfig):
    """count:      integers from 0 to count - 1
    null_label: the one that stands for "none" (and may be asked for too); null: one more, the last
    """

    kind: str = "label"
    field: str = "class_label"
    count: int = 1000
    null_label: int | None = None


class LabelEncoder(ConditionEncoder):
    """Integers (B,) -> `label` (B,), for networks that embed them."""

    config_class = LabelEncoderConfig

    def __init__(self, config: LabelEncoderConfig) -> None:
        own = config.null_label is None
        super().__init__(config.field, {"label": config.count + own}, config.drop_rate, config.guidance_scale)
        if config.count < 1 or not 0 <= (config.null_label or 0) < config.count:
            raise DarkroomError(f"label: {config.null_label} of {config.count} labels; give 0 to {config.count - 1}")
        self.config = config
        self.null_label = config.count if config.null_label is None else config.null_label

    def encode(self, values: Sequence[Any] | Tensor) -> Conditioning:
        labels = torch.as_tensor(values, dtype=torch.int64)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.widths["label"]:
            raise DarkroomError(f"label {labels.tolist()}: this model has 0 to {self.config.count - 1}")
        return Conditioning(label=labels)

    def null(self, batch_size: int) -> Conditioning:
        return Conditioning(label=torch.full((batch_size,), self.null_label))

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> int:
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if not isinstance(value, int) or not 0 <= value < self.widths["label"]:
            raise DarkroomError(f"{field}: {value!r} is not known; this model has 0 to {self.config.count - 1}")
        return value


@dataclass
class VectorEncoderConfig(EncoderConfig):
    """width:  numbers in a vector
    slot:   "vector", which modulates every residual block, or "context", one token
    noise_levels: above 0: noise of a random level below this is added in training, on the scale of 1000 of unCLIP
    level_width: so many numbers behind the vector tell the level (as many as the vector has in SD 2.1 unCLIP)
    noise_level: that is used to generate, unless the request says another
    """

    kind: str = "vector"
    field: str = "embedding"
    width: int = 768
    slot: Literal["vector", "context"] = "vector"
    noise_levels: int = 0
    level_width: int = 0
    noise_level: int = 0


class VectorEncoder(ConditionEncoder):
    """Vectors (B, D) -> `vector` (B, D + level_width) or `context` (B, 1, D + level_width). Null: zeros.

    With noise, the vectors are brought to mean 0 and deviation 1 by `data_mean` and `data_std` (as the checkpoints of
    SD 2.1 unCLIP hold them), get their noise, and are brought back.
    """

    config_class = VectorEncoderConfig
    data_mean: Tensor
    data_std: Tensor

    def __init__(self, config: VectorEncoderConfig) -> None:
        if not 0 <= config.noise_levels <= LEVELS or config.width < 1 or config.level_width % 2:
            raise DarkroomError(
                f"vector: width {config.width}, level_width {config.level_width}, noise_levels {config.noise_levels}; "
                f"give 1 or more, an even number, and 0 to {LEVELS}"
            )
        width = config.width + config.level_width
        super().__init__(config.field, {config.slot: width}, config.drop_rate, config.guidance_scale)
        self.config = config
        if config.noise_levels:
            self.register_buffer("data_mean", torch.zeros(1, config.width))
            self.register_buffer("data_std", torch.ones(1, config.width))

    def encode(self, values: Tensor | Noised) -> Conditioning:
        noised = values if isinstance(values, Noised) else Noised(values, torch.zeros(len(values), dtype=torch.int64))
        parts = [noised.values.float()]
        if self.config.level_width:
            parts.append(level_embedding(noised.level, self.config.level_width).to(noised.values.device))
        return self._slot(torch.cat(parts, 1))

    def _slot(self, vector: Tensor) -> Conditioning:
        return Conditioning(vector=vector) if self.config.slot == "vector" else Conditioning(context=vector[:, None])

    def null(self, batch_size: int) -> Conditioning:
        return self._slot(torch.zeros(batch_size, self.widths[self.config.slot]))

    @property
    def noise_levels(self) -> int:
        return self.config.noise_levels

    def augment(self, values: Tensor, generator: torch.Generator) -> Tensor | Noised:
        if not self.config.noise_levels:
            return values
        return self._restored(draw_noise(self._scaled(values), self.config.noise_levels, generator, EMBEDDING_NOISE))

    def noised(self, values: Tensor, level: int | None, noise: Tensor) -> Tensor | Noised:
        highest = self.config.noise_levels
        if not highest:
            return values
        chosen = torch.full((len(values),), check_level(self.config.noise_level if level is None else level, highest))
        return self._restored(with_noise(self._scaled(values), chosen, noise, EMBEDDING_NOISE))

    def _scaled(self, values: Tensor) -> Tensor:
        return (values.float() - self.data_mean.to(values.device)) / self.data_std.to(values.device)

    def _restored(self, noised: Noised) -> Noised:
        at = noised.values.device
        return Noised(noised.values * self.data_std.to(at) + self.data_mean.to(at), noised.level)

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> Tensor:
        numbers = torch.as_tensor(np.asarray(value, np.float32) if not isinstance(value, Tensor) else value).float()
        if numbers.shape != (self.config.width,):
            raise DarkroomError(f"{field}: shape {tuple(numbers.shape)}; this model takes {self.config.width} numbers")
        return numbers

    def several(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and len(value) > 0 and not isinstance(value[0], (int, float))
