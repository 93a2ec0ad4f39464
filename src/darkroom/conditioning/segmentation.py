"""Label maps: joined to the latent's channels through the spatial rescaler, as in the paper, or as tokens.

Shapes: B batch, K labels, C channels, H W image size, h w latent size, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.conditioning.encoder import ConditionEncoder, DataFacts, EncoderConfig, Parts, fill
from darkroom.conditioning.pictures import as_labels
from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError

Method = Literal["nearest", "bilinear", "bicubic", "area"]


class SpatialRescaler(nn.Module):
    """(B, C, H, W) -> (B, out_channels, H/2^stages, W/2^stages): halved `stages` times, then a 1x1 convolution.

    Source: the class of this name in the paper's code, parameter names as there. Halving interpolates with
    align_corners False and without antialiasing. Without out_channels the channels stay.
    """

    def __init__(
        self,
        stages: int,
        in_channels: int = 3,
        out_channels: int | None = None,
        method: str = "bilinear",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.stages, self.method = stages, method
        self.channel_mapper = None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.stages):
            x = F.interpolate(x, scale_factor=0.5, mode=self.method)
        return x if self.channel_mapper is None else self.channel_mapper(x)


def one_hot(labels: Tensor, count: int) -> Tensor:
    """(B, H, W) integers -> (B, count, H, W) float32; ids of `count` and above (such as 255, "ignore") are no label."""
    return (labels[:, None] == torch.arange(count, device=labels.device)[:, None, None]).float()


@dataclass
class _MapConfig(EncoderConfig):
    """classes: names of the ids in `segmentation`"""

    field: str = "segmentation"
    classes: list[str] = dataclass_field(default_factory=list)

    def completed(self, name: str, data: DataFacts) -> Self:
        if self.classes:
            return self
        if not data.map_names:
            raise DarkroomError(
                f'"conditioner.{name}" needs label maps with named classes, but the data has none: add classes.json'
            )
        return replace(self, classes=list(data.map_names))


class _MapEncoder(ConditionEncoder):
    """What both arrangements share."""

    config: Any

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> Tensor:
        return as_labels(field, value, size, len(self.config.classes))


@dataclass
class SegmentationEncoderConfig(_MapConfig):
    """channels: of the result; null: as many as the latent has
    stages:   halvings from the image to the latent; null: those of the first stage
    method, bias: of the rescaler
    """

    kind: str = "segmentation"
    channels: int | None = None
    stages: int | None = None
    method: Method = "bilinear"
    bias: bool = False

    def fitted(self, parts: Parts) -> Self:
        stages = None if parts.downsampling is None else parts.downsampling.bit_length() - 1
        return fill(self, stages=stages, channels=parts.latent_channels)


class SegmentationEncoder(_MapEncoder):
    """Label maps (B, H, W) -> `concat` (B, C, h, w) through `SpatialRescaler`. Null: no label at any place."""

    config_class = SegmentationEncoderConfig

    def __init__(self, config: SegmentationEncoderConfig) -> None:
        assert config.channels is not None and config.stages is not None
        if not config.classes:
            raise DarkroomError("segmentation: no classes; give their names in `classes`")
        super().__init__(config.field, {"concat": config.channels}, config.drop_rate, config.guidance_scale)
        self.config = config
        self.rescaler = SpatialRescaler(config.stages, len(config.classes), config.channels, config.method, config.bias)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, values: Tensor) -> Conditioning:
        return Conditioning(concat=self.rescaler(one_hot(values.to(self._device), len(self.config.classes))))

    def null(self, batch_size: int) -> Conditioning:
        assert self.rescaler.channel_mapper is not None
        nothing = torch.zeros(batch_size, len(self.config.classes), 1, 1, device=self._device)
        return Conditioning(concat=self.rescaler.channel_mapper(nothing))


@dataclass
class SegmentationTokensConfig(_MapConfig):
    """width:  D
    grid:   cells along each side; each is a token, whatever the size of the picture
    detail: a cell tells how much of each label is in detail x detail parts of it
    """

    kind: str = "segmentation_tokens"
    width: int = 256
    grid: int = 8
    detail: int = 2


class SegmentationTokens(_MapEncoder):
    """Label maps (B, H, W) -> `context` (B, grid^2, D): the share of each label in every cell, embedded, plus a learned
    position. Null: no label in any cell."""

    config_class = SegmentationTokensConfig

    def __init__(self, config: SegmentationTokensConfig) -> None:
        if not config.classes:
            raise DarkroomError("segmentation: no classes; give their names in `classes`")
        super().__init__(config.field, {"context": config.width}, config.drop_rate, config.guidance_scale)
        self.config = config
        self.embed = nn.Linear(len(config.classes) * config.detail**2, config.width)
        self.position = nn.Parameter(torch.randn(config.grid**2, config.width))
        self.norm = nn.LayerNorm(config.width)

    def _tokens(self, shares: Tensor) -> Conditioning:
        """(B, K, grid*detail, grid*detail) -> context."""
        cells = F.pixel_unshuffle(shares, self.config.detail).flatten(2).mT
        return Conditioning(context=self.norm(self.embed(cells) + self.position))

    def encode(self, values: Tensor) -> Conditioning:
        labels = one_hot(values.to(self.position.device), len(self.config.classes))
        return self._tokens(F.adaptive_avg_pool2d(labels, self.config.grid * self.config.detail))

    def null(self, batch_size: int) -> Conditioning:
        side = self.config.grid * self.config.detail
        return self._tokens(self.position.new_zeros(batch_size, len(self.config.classes), side, side))
