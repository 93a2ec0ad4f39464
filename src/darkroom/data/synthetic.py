"""Procedural sets with more than 8 bits or other than 3 channels, drawn when they are asked for.

phantoms16: grey 16-bit "radiographs". Ellipsoids of different density attenuate a beam, I = I0*exp(-sum mu*length):
    smooth gradients over the whole range, faint nodules of a few hundred steps of 65535 (one step of 8 bits is 257).
bands6: float32 reflectances of a landscape in six bands (blue, green, red, near and two short-wave infrared). Fields,
    forest, soil and water have spectra, relief shades all bands alike, haze brightens the blue ones.

Example (seed, split, index) is always the same. Shapes: H W image size, C channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from darkroom.data.sources import DataConfig, ImageDataset
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat

VERSION = 1  # part of the data digest: raise it when a change below alters any picture
BANDS = ("blue", "green", "red", "near infrared", "short-wave infrared 1", "short-wave infrared 2")
# Reflectances by band, rounded from the typical spectra of Sentinel-2 scenes.
SPECTRA = {
    "crop": (0.04, 0.08, 0.05, 0.42, 0.22, 0.12),
    "meadow": (0.05, 0.09, 0.07, 0.30, 0.26, 0.16),
    "stubble": (0.09, 0.13, 0.18, 0.28, 0.36, 0.30),
    "soil": (0.07, 0.10, 0.14, 0.20, 0.28, 0.25),
    "forest": (0.02, 0.04, 0.03, 0.24, 0.11, 0.05),
    "water": (0.06, 0.05, 0.03, 0.02, 0.01, 0.01),
    "built": (0.14, 0.16, 0.18, 0.22, 0.24, 0.22),
}
BRIGHTEST = 0.8
HAZE = np.array([0.06, 0.035, 0.02, 0.008, 0.002, 0.001])  # falls with the wavelength, as scattering does


@dataclass(frozen=True)
class SyntheticSet:
    """draw(rng, (width, height)) -> (H, W, C) in the type of `pixels`."""

    draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
    channels: int
    pixels: PixelFormat
    count: int = 4000


def draw_phantom(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """One radiograph, uint16 (H, W, 1), from 0 (no light) to 65535 (no attenuation)."""
    x, y = _coordinates(size)
    depth = np.zeros_like(x)
    body = _Ellipse(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), rng.uniform(0.7, 0.95), rng.uniform(0.55, 0.85))
    body = _Ellipse(body.x, body.y, body.a, body.b, rng.uniform(0, np.pi))
    depth += rng.uniform(1.2, 1.8) * body.thickness(x, y)
    for _ in range(rng.integers(2, 5)):  # organs, denser or lighter than the body
        organ = body.inner(rng, (0.2, 0.5))
        depth += rng.uniform(-0.9, 0.9) * organ.thickness(x, y)
    for _ in range(rng.integers(0, 4)):  # bones: dense, with a sharp edge
        bone = body.inner(rng, (0.05, 0.18))
        depth += rng.uniform(0.5, 1.6) * np.sqrt(bone.thickness(x, y))
    for _ in range(rng.integers(1, 5)):  # nodules that 8 bits would flatten
        nodule = body.inner(rng, (0.05, 0.12))
        depth += rng.uniform(0.01, 0.05) * nodule.thickness(x, y)
    light = np.exp(-np.maximum(depth, 0.0))
    light *= 1 - rng.uniform(0.0, 0.08) * ((x - rng.uniform(-1, 1)) ** 2 + (y - rng.uniform(-1, 1)) ** 2) / 8
    dark = light.min()
    light = (light - dark * rng.uniform(0.3, 1.0)) / (1 - dark * 0.3)
    return np.rint(np.clip(light / light.max(), 0, 1) * 65535).astype(np.uint16)[..., None]


def draw_bands(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """One landscape, float32 (H, W, 6) of reflectances in [0, 0.8]."""
    x, y = _coordinates(size)
    names = [n for n in SPECTRA if n != "water"]
    # Fields: the nearest of some centres; their borders bend with the relief.
    relief = _waves(rng, x, y, count=10, longest=2.0)
    warp = 0.05 * relief
    centres = rng.uniform(-1.2, 1.2, (rng.integers(6, 16), 2))
    distance = (x + warp - centres[:, 0, None, None]) ** 2 + (y - warp - centres[:, 1, None, None]) ** 2
    field = distance.argmin(0)
    spectra = np.array([SPECTRA[names[i]] for i in rng.integers(len(names), size=len(centres))])
    spectra *= rng.uniform(0.85, 1.15, (len(centres), 1)) * rng.uniform(0.96, 1.04, spectra.shape)
    image = spectra[field]
    if rng.random() < 0.7:  # water runs where the ground is low
        level = np.quantile(relief, rng.uniform(0.05, 0.3))
        wet = 1 / (1 + np.exp(np.clip((relief - level) * 60, -50, 50)))[..., None]
        image = image * (1 - wet) + np.array(SPECTRA["water"]) * wet
    light = 1 + 0.15 * (np.roll(relief, 1, 1) - np.roll(relief, -1, 1)) * size[0] / 16
    light[:, 0], light[:, -1] = light[:, 1], light[:, -2]  # the roll wraps round
    image = image * np.clip(light, 0.5, 1.5)[..., None]
    texture = _waves(rng, x, y, count=24, longest=0.25)
    image = image * (1 + 0.03 * texture[..., None])
    image = image + rng.uniform(0.0, 1.0) * HAZE * (1 + 0.3 * _waves(rng, x, y, count=4, longest=2.0)[..., None])
    return np.clip(image, 0.0, BRIGHTEST).astype(np.float32)


SETS: dict[str, SyntheticSet] = {
    "phantoms16": SyntheticSet(draw_phantom, 1, PixelFormat.of("uint16")),
    "bands6": SyntheticSet(draw_bands, len(BANDS), PixelFormat.of("float32", (0.0, BRIGHTEST))),
}


class SyntheticDataset(ImageDataset):
    """A procedural set as examples: images and nothing else."""

    def __init__(self, config: DataConfig, split: str) -> None:
        super().__init__(config, split)
        self.set = SETS[str(config.source)]
        if config.channels != self.set.channels:
            raise DarkroomError(
                f"{config.source} has {self.set.channels} channels, data.channels is {config.channels}; make them equal"
            )
        if config.pixels != self.set.pixels.dtype:
            raise DarkroomError(
                f"{config.source} has {self.set.pixels.dtype} pixels, data.pixels is {config.pixels}; make them equal"
            )
        if config.exclude or config.captions:
            raise DarkroomError(f"{config.source} has no metadata and no classes; leave out `exclude` and `captions`")
        count = self.set.count if config.count is None else config.count
        if split == "validation":
            count = min(max(count // 10, 1), 1000)
        self.count = count if config.limit is None else min(count, config.limit)
        if self.count < 1:
            raise DarkroomError(f"{config.source} without examples; set count (and limit) to 1 or more")
        self.fields = ("image",)
        identity = [config.source, VERSION, config.seed, split, self.size, self.count, self.pixels.to_dict()]
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        values = self.set.draw(_generator(self.config, self.split, index), self.size)
        return {"image": torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))}

    def captions(self) -> list[str]:
        return []


def open_synthetic(source: str, size: tuple[int, int], count: int, seed: int = 0) -> SyntheticDataset:
    """The training split of a set, with its own channels and pixel format."""
    if source not in SETS:
        raise DarkroomError(f"{source!r} is no procedural set; use {' or '.join(SETS)}")
    pixels = SETS[source].pixels
    config = DataConfig(
        source=source,
        size=size,
        channels=SETS[source].channels,
        pixels=pixels.dtype,
        value_range=(pixels.low, pixels.high),
        count=count,
        seed=seed,
    )
    return SyntheticDataset(config, "train")


def _generator(config: DataConfig, split: str, index: int) -> np.random.Generator:
    key: Sequence[int] = [config.seed, int(split == "validation"), sorted(SETS).index(str(config.source)), index]
    return np.random.default_rng(key)


def _coordinates(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """x, y of pixel centres, (H, W), from -1 to 1 along the shorter side."""
    width, height = size
    half = min(size) / 2
    x = (np.arange(width) + 0.5 - width / 2) / half
    y = (np.arange(height) + 0.5 - height / 2) / half
    return np.broadcast_to(x[None], (height, width)).copy(), np.broadcast_to(y[:, None], (height, width)).copy()


def _waves(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, count: int, longest: float) -> np.ndarray:
    """A smooth random surface, (H, W), of mean 0 and about unit size: waves whose height grows with their length."""
    length = longest * 2.0 ** -rng.uniform(0, 3, count)
    angle, phase = rng.uniform(0, 2 * np.pi, (2, count))
    # sin(u + v) is the imaginary part of exp(iu)*exp(iv), so that the waves of a grid are one product of matrices.
    across = np.exp(1j * (x[:1].T * (np.cos(angle) * 2 * np.pi / length) + phase))  # (W, count)
    down = np.exp(1j * y[:, :1] * (np.sin(angle) * 2 * np.pi / length))  # (H, count)
    surface: np.ndarray = ((down * length) @ across.T).imag
    return surface / np.sqrt((length**2).sum() / 2)


@dataclass(frozen=True)
class _Ellipse:
    """Centre, half axes, and angle in radians."""

    x: float
    y: float
    a: float
    b: float
    angle: float = 0.0

    def thickness(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """How much of the ellipsoid a ray at each point crosses: 1 in the middle, 0 outside, smooth but at the rim."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        u = ((x - self.x) * cos + (y - self.y) * sin) / self.a
        v = ((y - self.y) * cos - (x - self.x) * sin) / self.b
        return np.sqrt(np.maximum(1 - u * u - v * v, 0.0))

    def inner(self, rng: np.random.Generator, radii: tuple[float, float]) -> _Ellipse:
        """A smaller ellipse, most of it inside this one; `radii` are the least and greatest half axis."""
        turn, out = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.6)
        return _Ellipse(
            self.x + out * self.a * np.cos(turn),
            self.y + out * self.b * np.sin(turn),
            rng.uniform(*radii),
            rng.uniform(*radii),
            rng.uniform(0, np.pi),
        )
