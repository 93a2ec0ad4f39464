"""What a first stage makes of flat colours: the cheapest way to see patterns that its decoder adds to every picture.

A flat image goes in; what comes out should be flat and of the same colour. Everything beside the mean is the decoder's
own doing: checkerboards of up-sampling (Odena et al. 2016, distill.pub), blotches, frames along the border.
Shapes: N colours, C image channels, S side of the square images, f downsampling.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from darkroom.errors import DarkroomError

STEP = 2.0 / 255.0  # one 8-bit step of images in [-1, 1]
SIZE = 64
AMPLIFIED = 16.0  # in the picture
RGB = {
    "black": (-1.0, -1.0, -1.0),
    "grey": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "red": (0.8, -0.8, -0.8),
    "green": (-0.8, 0.8, -0.8),
    "blue": (-0.8, -0.8, 0.8),
    "yellow": (0.8, 0.8, -0.8),
    "skin": (0.65, 0.25, 0.05),
}


class Codec(Protocol):
    """What is tested; a `FirstStage` is one."""

    @property
    def downsampling(self) -> int: ...

    @property
    def image_channels(self) -> int: ...

    def encode(self, image: Tensor) -> Any: ...

    def decode(self, latent: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FlatColour:
    """One colour. Numbers are in 8-bit steps (1/255 of the range) unless they say otherwise.

    colour_error: the largest error of a channel's mean. ripple: standard deviation around the means, all channels
    together. decibels: power of the ripple relative to that of the full range. interior: ripple without the border.
    frequency: (vertical, horizontal) cycles per pixel of the strongest wave of the interior, each from 0 to 1/2.
    period: its length in pixels. share: of the interior's ripple power that it holds.
    """

    name: str
    colour: tuple[float, ...]
    colour_error: float
    ripple: float
    decibels: float
    interior: float
    frequency: tuple[float, float]
    period: float
    share: float

    @property
    def pattern(self) -> str:
        """The strongest wave in words."""
        if self.ripple < 0.01:
            return "none"
        vertical, horizontal = (f > 0 for f in self.frequency)
        direction = "checkerboard" if vertical and horizontal else "rows" if vertical else "columns"
        return f"{direction}, period {self.period:.3g} px, {100 * self.share:.0f} % of the power"


@dataclass(frozen=True)
class FlatColourResult:
    """All colours, and the worst of them. `picture` (N, C, 2S, S) in [-1, 1]: what came out, and under it the ripple,
    AMPLIFIED times around mid-grey."""

    colours: tuple[FlatColour, ...]
    size: int
    picture: Tensor

    @property
    def ripple(self) -> float:
        """The largest standard deviation of all colours, in 8-bit steps."""
        return max(c.ripple for c in self.colours)

    @property
    def colour_error(self) -> float:
        """The largest error of a mean, in 8-bit steps."""
        return max(c.colour_error for c in self.colours)

    @property
    def worst(self) -> FlatColour:
        return max(self.colours, key=lambda c: c.ripple)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        colours = [{k: _rounded(v) for k, v in asdict(c).items()} | {"pattern": c.pattern} for c in self.colours]
        worst = {"name": self.worst.name, "pattern": self.worst.pattern}
        return {
            "size": self.size,
            "ripple": round(self.ripple, 4),
            "colour_error": round(self.colour_error, 4),
            "worst": worst,
            "colours": colours,
        }


def flat_colours(channels: int) -> dict[str, tuple[float, ...]]:
    """Names and values in [-1, 1]: for three channels those of RGB; else grey levels, and up to 8 channels alone."""
    if channels == 3:
        return dict(RGB)
    levels = {"black": -1.0, "dark": -0.5, "grey": 0.0, "light": 0.5, "white": 1.0}
    found = {name: (level,) * channels for name, level in levels.items()}
    if channels > 1:
        for alone in range(min(channels, 8)):
            found[f"channel {alone + 1}"] = tuple(0.8 if c == alone else -0.8 for c in range(channels))
    return found


@torch.no_grad()
def flat_colour_test(
    first_stage: Codec, size: int = SIZE, device: torch.device | str | None = None
) -> FlatColourResult:
    """Encode (the posterior's mode) and decode flat images of `size` pixels a side.

    The border is a quarter of the side or two latent positions, whichever is smaller; the strongest wave is looked for
    in what it leaves.
    """
    f = first_stage.downsampling
    size = max(size // f, 4) * f
    if device is None:
        device = next((p.device for p in getattr(first_stage, "parameters", lambda: iter(()))()), torch.device("cpu"))
    named = flat_colours(first_stage.image_channels)
    images = torch.tensor(list(named.values()), dtype=torch.float32, device=device)
    images = images[:, :, None, None].expand(-1, -1, size, size)
    decoded = torch.cat([first_stage.decode(first_stage.encode(i[None]).mode()).float() for i in images]).cpu()
    if decoded.shape != images.shape:
        raise DarkroomError(f"the first stage makes {tuple(decoded.shape)} of {tuple(images.shape)}")
    border = f * max(1, min(2, size // f // 4))
    found = tuple(
        measure_flatness(name, colour, image, border)
        for (name, colour), image in zip(named.items(), decoded, strict=True)
    )
    ripple = (decoded - decoded.mean((2, 3), keepdim=True)) * AMPLIFIED
    return FlatColourResult(found, size, torch.cat([decoded, ripple], 2).clamp(-1, 1))


def measure_flatness(name: str, colour: tuple[float, ...], decoded: Tensor, border: int) -> FlatColour:
    """One decoded flat image (C, S, S)."""
    x = decoded.double()
    mean = x.mean((1, 2))
    error = float((mean.clamp(-1, 1) - torch.tensor(colour, dtype=torch.float64)).abs().max())
    power = float((x - mean[:, None, None]).square().mean())  # = sum of |X_k|^2 / (C S^4) off DC, by Parseval's theorem
    inner = x[:, border:-border, border:-border] if border else x
    inner = inner - inner.mean((1, 2), keepdim=True)
    inner_power = float(inner.square().mean())
    frequency, share = strongest_wave(inner)
    cycles = math.hypot(*frequency)
    return FlatColour(
        name,
        colour,
        colour_error=error / STEP,
        ripple=math.sqrt(power) / STEP,
        decibels=10 * math.log10(max(power, 1e-30) / 4.0),
        interior=math.sqrt(inner_power) / STEP,
        frequency=frequency,
        period=1 / max(frequency) if cycles else 0.0,
        share=share,
    )


def strongest_wave(x: Tensor) -> tuple[tuple[float, float], float]:
    """((vertical, horizontal) cycles per pixel, share of the power off DC) of the largest coefficient of (C, H, W)."""
    spectrum = torch.fft.fft2(x.double()).abs().square().sum(0)  # (H, W)
    spectrum[0, 0] = 0.0
    total = float(spectrum.sum())
    if total <= 0:
        return (0.0, 0.0), 0.0
    height, width = spectrum.shape
    # A real wave has a coefficient and its mirror image; waves that differ in direction only are one pattern.
    rows, columns = (torch.minimum(torch.arange(n), n - torch.arange(n)) for n in (height, width))
    folded = torch.zeros(height // 2 + 1, width // 2 + 1, dtype=spectrum.dtype)
    folded.index_put_((rows[:, None].expand(height, width), columns.expand(height, width)), spectrum, accumulate=True)
    place = int(folded.argmax())
    row, column = divmod(place, folded.shape[1])
    return (row / height, column / width), float(folded.flatten()[place]) / total


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value
