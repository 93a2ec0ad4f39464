"""Pictures as conditions, joined to the latent's channels: a low-resolution or blurred picture, a masked picture with
its mask, a depth map.

None of them is dropped in training unless its config says so, as in the official models; guidance then leaves them on
both sides. Shapes: B batch, C channels, H W image size, E latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.conditioning.augmentation import IMAGE_NOISE, LEVELS, Noised, check_level, draw_noise, with_noise
from darkroom.conditioning.encoder import ConditionEncoder, DataFacts, EncoderConfig, Parts, fill
from darkroom.conditioning.filling import filled
from darkroom.conditioning.pictures import as_depth, as_image, as_mask
from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError

EncodeImage = Callable[[Tensor, bool], Tensor]


def _flat(batch_size: int, *channels: float) -> Tensor:
    """(B, C, 1, 1): the same everywhere."""
    return torch.tensor(channels, dtype=torch.float32)[None, :, None, None].expand(batch_size, -1, 1, 1)


# --- low resolution ---------------------------------------------------------------------------------------------------


@dataclass
class LowResolutionConfig(EncoderConfig):
    """factor:       how many times larger the image is than `low_resolution`; null: that of the data. 1: blurred images
    via:          "pixels": the picture itself at the latent's size, as in the paper and in the x4 upscaler of SD 2.
                  Where it has more pixels than the latent, those of a block become channels. "latent": enlarged to the
                  image's size and encoded by the first stage
    noise_levels: above 0: noise of a random level below this is added in training (350 in SD 2, of a scale of 1000)
    noise_label:  tell the network the level, through the slot `label`
    noise_level:  that is used to generate, unless the request says another
    channels, downsampling: of the pictures, and from image to latent; null: those of the first stage
    """

    kind: str = "low_resolution"
    field: str = "low_resolution"
    drop_rate: float = 0.0
    factor: int | None = None
    via: Literal["pixels", "latent"] = "pixels"
    noise_levels: int = 0
    noise_label: bool = True
    noise_level: int = 20
    channels: int | None = None
    downsampling: int | None = None
    latent_channels: int | None = None

    def completed(self, name: str, data: DataFacts) -> Self:
        if self.factor is None and data.low_resolution_factor is None:
            raise DarkroomError(
                f'"conditioner.{name}" needs pictures of low resolution: set "data.low_resolution.factor", or its own '
                '"factor" where the data has such pictures'
            )
        return self if self.factor is not None else replace(self, factor=data.low_resolution_factor)

    def fitted(self, parts: Parts) -> Self:
        filled: Self = fill(
            self,
            channels=parts.image_channels,
            downsampling=parts.downsampling,
            latent_channels=parts.latent_channels,
        )
        return filled


class LowResolutionEncoder(ConditionEncoder):
    """Pictures (B, C, H/factor, W/factor) in [-1, 1] -> `concat` (B, C', h, w), with noise also `label`, the level of
    the noise. Null: grey, or a latent of zeros, without noise."""

    config_class = LowResolutionConfig

    def __init__(self, config: LowResolutionConfig, encode_image: EncodeImage | None = None) -> None:
        assert config.channels and config.downsampling and config.latent_channels
        if config.factor is None or config.factor < 1:
            raise DarkroomError(f"low_resolution: factor is {config.factor}; say how many times larger the image is")
        if not 0 <= config.noise_levels <= LEVELS:
            raise DarkroomError(f"low_resolution: noise_levels is {config.noise_levels}; give 0 to {LEVELS}")
        # A block of so many pixels along each side becomes one pixel of the latent.
        self.block = 1
        if config.via == "pixels" and config.downsampling > config.factor:
            if config.downsampling % config.factor:
                raise DarkroomError(
                    f"low_resolution: pictures {config.factor} times smaller and latents {config.downsampling} times "
                    'smaller than the image do not fit on each other; set via: "latent"'
                )
            self.block = config.downsampling // config.factor
        channels = config.latent_channels if config.via == "latent" else config.channels * self.block**2
        labels = {"label": LEVELS} if config.noise_levels and config.noise_label else {}
        super().__init__(config.field, {"concat": channels, **labels}, config.drop_rate, config.guidance_scale)
        self.config, self._encode_image = config, encode_image

    @classmethod
    def build(cls, config: LowResolutionConfig, parts: Parts) -> LowResolutionEncoder:
        return cls(config, parts.encode)

    def encode(self, values: Tensor | Noised) -> Conditioning:
        level = values.level if isinstance(values, Noised) else torch.zeros(len(values), dtype=torch.int64)
        picture = values.values if isinstance(values, Noised) else values
        label = level if "label" in self.widths else None
        return Conditioning(concat=self._map(picture), label=label)

    def _map(self, picture: Tensor) -> Tensor:
        """At the latent's size."""
        factor, f = self.config.factor or 1, self.config.downsampling or 1
        height, width = picture.shape[2] * factor, picture.shape[3] * factor
        if self.config.via == "latent":
            if self._encode_image is None:
                raise DarkroomError('low_resolution: via "latent" needs a first stage, and this model has none')
            return self._encode_image(_resized(picture, height, width), True)
        if self.block > 1:
            return F.pixel_unshuffle(picture, self.block)
        return _resized(picture, -(-height // f), -(-width // f))

    def null(self, batch_size: int) -> Conditioning:
        label = torch.zeros(batch_size, dtype=torch.int64) if "label" in self.widths else None
        return Conditioning(concat=_flat(batch_size, *[0.0] * self.widths["concat"]), label=label)

    @property
    def noise_levels(self) -> int:
        return self.config.noise_levels

    def augment(self, values: Tensor, generator: torch.Generator) -> Tensor | Noised:
        if not self.config.noise_levels:
            return values
        return draw_noise(values, self.config.noise_levels, generator, IMAGE_NOISE)

    def noised(self, values: Tensor, level: int | None, noise: Tensor) -> Tensor | Noised:
        highest = self.config.noise_levels
        if not highest:
            return values
        chosen = check_level(min(self.config.noise_level, highest - 1) if level is None else level, highest)
        return with_noise(values, torch.full((len(values),), chosen), noise, IMAGE_NOISE)

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> Tensor:
        factor, channels = self.config.factor or 1, self.config.channels or 3
        return as_image(field, value, (-(-size[0] // factor), -(-size[1] // factor)), channels)


def _resized(picture: Tensor, height: int, width: int) -> Tensor:
    """(B, C, height, width), bicubic; as it is where it has that size."""
    if picture.shape[2:] == (height, width):
        return picture
    return F.interpolate(picture, size=(height, width), mode="bicubic", antialias=True)


# --- masked pictures --------------------------------------------------------------------------------------------------


@dataclass
class MaskedImageConfig(EncoderConfig):
    """The defaults are those of the inpainting models of SD 1 and 2. In brackets: of the paper's (inpainting_big).

    mask_first: the mask before the latent's channels (false: behind them)
    normalised: the latent of the masked picture with shift and scale (false: as the autoencoder gives it)
    fill:       what is under the mask, from -1 black to 1 white (-1), or "smooth": what is around it, continued (ours).
                What the encoder gives for the pixels beside a hole is then about what it would give without one
    mask_range: the mask's values where the picture is kept and where it is repainted ([-1, 1])
    mask_via:   how the mask comes to the latent's size: its "nearest" pixel, or "pixels": all f*f of a block as
                channels, which also tells of strokes that are thinner than a block (ours)
    latent_channels, image_channels, downsampling: null: those of the first stage
    """

    kind: str = "masked_image"
    field: str = "repaint_mask"
    drop_rate: float = 0.0
    mask_first: bool = True
    normalised: bool = True
    fill: float | Literal["smooth"] = 0.0
    mask_range: tuple[float, float] = (0.0, 1.0)
    mask_via: Literal["nearest", "pixels"] = "nearest"
    latent_channels: int | None = None
    image_channels: int | None = None
    downsampling: int | None = None

    def fitted(self, parts: Parts) -> Self:
        own = {"latent_channels": parts.latent_channels, "image_channels": parts.image_channels}
        if self.mask_via == "pixels":
            own["downsampling"] = parts.downsampling
        filled: Self = fill(self, **own)
        return filled

    @property
    def block(self) -> int:
        """Pixels along each side of a block whose mask becomes channels."""
        return self.downsampling or 1 if self.mask_via == "pixels" else 1


class MaskedImageEncoder(ConditionEncoder):
    """`image` (B, C, H, W) in [-1, 1] and `repaint_mask` (B, 1, H, W), 1 = repaint -> `concat` (B, E + M, h, w): the
    latent of the picture with its hole, and the mask: M = 1 nearest pixel, or all f*f. Null: all is to be repainted."""

    config_class = MaskedImageConfig

    def __init__(self, config: MaskedImageConfig, encode_image: EncodeImage) -> None:
        assert config.latent_channels is not None
        channels = config.latent_channels + config.block**2
        super().__init__(("image", config.field), {"concat": channels}, config.drop_rate, config.guidance_scale)
        self.config, self._encode_image = config, encode_image

    @classmethod
    def build(cls, config: MaskedImageConfig, parts: Parts) -> MaskedImageEncoder:
        def later(image: Tensor, normalised: bool) -> Tensor:
            return parts.needed_encode("masked_image")(image, normalised)

        return cls(config, later)

    def encode(self, values: dict[str, Tensor]) -> Conditioning:
        image, mask = values["image"], (values[self.field] >= 0.5).to(values["image"])
        masked = filled(image, mask) if self.config.fill == "smooth" else image * (1 - mask) + self.config.fill * mask
        latent = self._encode_image(masked, self.config.normalised)
        low, high = self.config.mask_range
        small = self._at_latent(mask, (latent.shape[2], latent.shape[3])).to(latent) * (high - low) + low
        return Conditioning(concat=torch.cat([small, latent] if self.config.mask_first else [latent, small], dim=1))

    def _at_latent(self, mask: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, 1, H, W) -> (B, 1 or f*f, h, w). Where H and W are no multiples of f the last row and column are
        repeated, as they are in the picture before it is encoded."""
        block = self.config.block
        if block == 1:
            return F.interpolate(mask, size=size, mode="nearest")
        below, right = size[0] * block - mask.shape[2], size[1] * block - mask.shape[3]
        return F.pixel_unshuffle(F.pad(mask, (0, right, 0, below), mode="replicate"), block)

    def null(self, batch_size: int) -> Conditioning:
        assert self.config.latent_channels is not None
        latent, mask = [0.0] * self.config.latent_channels, [self.config.mask_range[1]] * self.config.block**2
        return Conditioning(concat=_flat(batch_size, *(mask + latent if self.config.mask_first else latent + mask)))

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> Tensor:
        if field == self.field:
            return as_mask(field, value, size)
        return as_image(field, value, size, self.config.image_channels or 3)


# --- depth ------------------------------------------------------------------------------------------------------------


@dataclass
class DepthEncoderConfig(EncoderConfig):
    """downsampling: from image to latent; null: that of the first stage"""

    kind: str = "depth"
    field: str = "depth"
    drop_rate: float = 0.0
    downsampling: int | None = None

    def fitted(self, parts: Parts) -> Self:
        filled: Self = fill(self, downsampling=parts.downsampling)
        return filled


class DepthEncoder(ConditionEncoder):
    """Depth (B, 1, H, W), larger = nearer, in any unit -> `concat` (B, 1, h, w): at the latent's size (bicubic), each
    picture's own range spread over [-1, 1], as in the depth model of SD 2. Null: the middle of the range everywhere."""

    config_class = DepthEncoderConfig

    def __init__(self, config: DepthEncoderConfig) -> None:
        assert config.downsampling is not None
        super().__init__(config.field, {"concat": 1}, config.drop_rate, config.guidance_scale)
        self.config = config

    def encode(self, values: Tensor) -> Conditioning:
        f = self.config.downsampling or 1
        size = (-(-values.shape[2] // f), -(-values.shape[3] // f))
        small = F.interpolate(values.float(), size=size, mode="bicubic", align_corners=False)
        least, greatest = (small.flatten(1).aminmax(dim=1)[i][:, None, None, None] for i in (0, 1))
        # The official bound of the division.
        return Conditioning(concat=2 * (small - least) / (greatest - least + 0.001) - 1)

    def null(self, batch_size: int) -> Conditioning:
        return Conditioning(concat=_flat(batch_size, 0.0))

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> Tensor:
        return as_depth(field, value, size)
