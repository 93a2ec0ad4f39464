"""A small decoder that shows what a latent will look like, much cheaper than the first stage's own decoder.

The idea of a tiny decoder distilled for a given latent space is TAESD's (Bohan 2023, github.com/madebyollin/taesd); the
network is our own: no norms and no attention, so that a position depends on its surroundings only; wide at the latents'
resolution, narrower at each doubling, and no convolution at full resolution: the last one makes the 2x2 pixels of each
position at half resolution.
Shapes: B batch, E latent channels, h w latent size, C image channels, f downsampling, H = f*h, W = f*w.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import DarkroomError

MAX_PARAMETERS = 1_000_000
LATENT_LIMIT = 3.0  # normalised latents beyond some standard deviations are squashed: early estimates can be far out


@dataclass(frozen=True)
class PreviewDecoderConfig:
    """The defaults fit any first stage from f = 2 to f = 32. None: follows from the first stage."""

    latent_channels: int | None = None
    image_channels: int | None = None
    downsampling: int | None = None
    channels: int = 32  # width at half resolution; doubled at each lower resolution
    max_channels: int = 96
    latent_blocks: int = 2  # residual blocks at the latent's resolution
    blocks: int = 1  # at each resolution above it


class PreviewDecoder(nn.Module):
    """Normalised latent (B, E, h, w) -> image (B, C, H, W), about [-1, 1]; at most a million parameters.

    `shift` and `scale`, () or (E,), are the statistics that it was trained with, latent = (z - shift) * scale: when a
    first stage measures its latents again, they are what its new latents are brought back to (`FirstStage.preview_of`).
    """

    shift: Tensor
    scale: Tensor
    config_dict: dict[str, Any]
    shared = False  # whether it came with a bundled first stage

    def __init__(self, config: PreviewDecoderConfig, shift: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        self.config = config
        latent_channels, image_channels, f = _sizes(config)
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float32).detach().clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32).detach().clone())
        doublings = f.bit_length() - 1  # f = 2^doublings; the last doubling is the pixel shuffle
        widths = [min(config.channels * 2**k, config.max_channels) for k in reversed(range(doublings))]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Sequential()
            if i:
                level.append(nn.Conv2d(widths[i - 1], width, 1))
                level.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
            for _ in range(config.blocks if i else config.latent_blocks):
                level.append(PreviewBlock(width))
            self.levels.append(level)
        self.conv_out = nn.Conv2d(widths[-1], 4 * image_channels, 3, padding=1)
        count = sum(p.numel() for p in self.parameters())
        if count > MAX_PARAMETERS:
            raise DarkroomError(
                f"this preview decoder has {count:,} parameters, more than {MAX_PARAMETERS:,}: lower its channels, "
                "max_channels or blocks"
            )

    @property
    def downsampling(self) -> int:
        return _sizes(self.config)[2]

    @property
    def latent_channels(self) -> int:
        return _sizes(self.config)[0]

    def forward(self, latent: Tensor) -> Tensor:
        x = LATENT_LIMIT * torch.tanh(latent / LATENT_LIMIT)
        x = F.relu(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(x), 2)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in ("shift", "scale"):  # one number or one per channel: the file decides
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.shape in ((), (self.latent_channels,)):
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PreviewBlock(nn.Module):
    """relu(x + conv(relu(conv(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # without norms, blocks that begin as the identity train faster
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def fitted(
    config: PreviewDecoderConfig, latent_channels: int, image_channels: int, downsampling: int
) -> PreviewDecoderConfig:
    """The config with what follows from a first stage filled in; a stated number that differs is an error."""
    derived = {"latent_channels": latent_channels, "image_channels": image_channels, "downsampling": downsampling}
    for name, value in derived.items():
        stated = getattr(config, name)
        if stated not in (None, value):
            raise DarkroomError(
                f'the preview decoder\'s "{name}" is {stated} but {value} follows from the first stage: leave it out'
            )
    return replace(config, **derived)


def _sizes(config: PreviewDecoderConfig) -> tuple[int, int, int]:
    """(E, C, f), checked."""
    e, c, f = config.latent_channels, config.image_channels, config.downsampling
    if e is None or c is None or f is None or min(e, c) < 1:
        raise DarkroomError(
            f"a preview decoder needs latent_channels, image_channels and downsampling, got {e}, {c}, {f}"
        )
    if f < 2 or f & (f - 1):
        raise DarkroomError(
            f"a preview decoder makes images of latents with downsampling 2, 4, 8, 16 or 32, got {f}"
            + (": latents of f = 1 are the image already" if f == 1 else "")
        )
    if min(config.channels, config.max_channels, config.latent_blocks) < 1 or config.blocks < 0:
        raise DarkroomError("a preview decoder needs channels, max_channels and latent_blocks of at least 1")
    return e, c, f
