"""The BSR pipeline: a small picture that went through unknown damage, as a condition of blind super-resolution.

Zhang et al. 2021, "Designing a practical degradation model for deep blind image super-resolution" (arXiv 2103.14006),
sec. 3: two blurs, a shrinking of a random kind, the resizing to the final size, Gaussian noise, JPEG and the noise of a
camera's sensor, in random order except that the final size comes after the shrinking; JPEG once more at the end.
`bsr` has the numbers of that paper. `bsr-light` has those of the released model of Rombach et al. 2022 (App. D.6.1),
who found the former too strong: blur of a quarter of the width, less noise, finer JPEG.

Everything is drawn from one NumPy generator, so that a picture's damage follows from a seed.
Shapes: C channels, H W image size; values float32 in [0, 1].
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from darkroom.data.resizing import bicubic


@dataclass(frozen=True)
class Strength:
    """blur:   factor on the widths of the kernels
    noise:  least and greatest standard deviation, of 255
    jpeg:   least and greatest quality
    sensor: least and greatest variance of the shot noise of white
    """

    blur: float
    noise: tuple[int, int]
    jpeg: tuple[int, int]
    sensor: tuple[float, float]


STRENGTHS = {
    "bsr": Strength(1.0, (2, 25), (30, 95), (1e-4, 0.012)),
    "bsr-light": Strength(0.25, (2, 8), (80, 95), (1e-4, 0.001)),
}
HALVED_FIRST, SHRUNK_AT_RANDOM, JPEG, SENSOR = 0.25, 0.75, 0.9, 0.25  # probabilities, of the paper's code
LARGEST_KERNEL = 25
Step = Callable[[Tensor], Tensor]


def degrade_blindly(image: Tensor, factor: int, strength: Strength, rng: np.random.Generator) -> Tensor:
    """(C, H, W) -> (C, ceil(H/factor), ceil(W/factor)), both in [0, 1]. C is 1 or 3."""
    final = (-(-image.shape[1] // factor), -(-image.shape[2] // factor))
    scale = factor
    if factor == 4 and rng.random() < HALVED_FIRST:
        half = (-(-image.shape[1] // 2), -(-image.shape[2] // 2))
        image = _resized(image, half, rng) if rng.random() < 0.5 else bicubic(image, half).clamp(0, 1)
        scale = 2

    def shrink(values: Tensor) -> Tensor:
        if rng.random() < SHRUNK_AT_RANDOM or scale == 1:
            by = rng.uniform(1, 2 * scale)  # often beyond the final size: the resizing that follows then enlarges
            return _resized(values, (round(values.shape[1] / by), round(values.shape[2] / by)), rng)
        kernel = gaussian_kernel(LARGEST_KERNEL, *(rng.uniform(0.1, 0.6 * scale) ** 2,) * 2, shift=(scale - 1) / 2)
        return filtered(values, kernel)[:, ::scale, ::scale]

    def compress(values: Tensor) -> Tensor:
        return jpeg(values, int(rng.integers(strength.jpeg[0], strength.jpeg[1] + 1)))

    steps: list[Step] = [
        lambda values: _blurred(values, scale, strength.blur, rng),
        lambda values: _blurred(values, scale, strength.blur, rng),
        shrink,
        lambda values: _resized(values, final, rng),
        lambda values: add_noise(values, int(rng.integers(strength.noise[0], strength.noise[1] + 1)) / 255, rng),
        lambda values: compress(values) if rng.random() < JPEG else values,
        lambda values: add_sensor_noise(values, strength.sensor, rng) if rng.random() < SENSOR else values,
    ]
    order = rng.permutation(len(steps)).tolist()
    first, last = sorted((order.index(2), order.index(3)))
    order[first], order[last] = 2, 3
    for number in order:
        image = steps[number](image).clamp(0, 1)
    return compress(image)


# --- blur -------------------------------------------------------------------------------------------------------------


def gaussian_kernel(size: int, along: float, across: float, angle: float = 0.0, shift: float = 0.0) -> Tensor:
    """(size, size) of sum 1: the density of variances `along` and `across` the direction `angle`, whose middle lies
    `shift` right of and below that of the kernel."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    # A variance of 0 would have no density; a hundredth of a pixel is none.
    inverse = turn @ np.diag([1 / max(along, 1e-4), 1 / max(across, 1e-4)]) @ turn.T
    offsets = np.arange(size) - (size - 1) / 2 - shift
    x, y = np.meshgrid(offsets, offsets)
    exponent = inverse[0, 0] * x**2 + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y**2
    kernel = np.exp(-0.5 * (exponent - exponent.min()))
    return torch.from_numpy((kernel / kernel.sum()).astype(np.float32))


def filtered(image: Tensor, kernel: Tensor) -> Tensor:
    """Correlation of (C, H, W) with an odd (k, k), the picture mirrored at its border; by FFT, which large kernels are
    faster with."""
    radius = kernel.shape[0] // 2
    rows, columns = (_mirrored(length, radius) for length in image.shape[1:])
    wide = image[:, rows][:, :, columns]
    size = (wide.shape[1], wide.shape[2])
    spectrum = torch.fft.rfft2(wide) * torch.fft.rfft2(kernel, s=size).conj()
    return torch.fft.irfft2(spectrum, s=size)[:, : image.shape[1], : image.shape[2]]


def _mirrored(length: int, radius: int) -> Tensor:
    """Indices -radius .. length + radius - 1 folded back into 0 .. length - 1, whatever the radius."""
    period = max(2 * length - 2, 1)
    index = torch.arange(-radius, length + radius).remainder(period)
    return torch.minimum(index, (period - index).remainder(period)) if length > 1 else torch.zeros_like(index)


def _blurred(image: Tensor, scale: int, factor: float, rng: np.random.Generator) -> Tensor:
    """Half of the time with a kernel that has a direction."""
    size = 2 * int(rng.integers(2, 12)) + 3
    if rng.random() < 0.5:
        along, across, turn = rng.random(3) * [factor * (4 + scale), factor * (4 + scale), math.pi]
        return filtered(image, gaussian_kernel(size, along, across, turn))
    variance = (factor * (2 + 0.2 * scale) * rng.random()) ** 2
    return filtered(image, gaussian_kernel(size, variance, variance))


# --- resizing ---------------------------------------------------------------------------------------------------------


def _resized(image: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """To (H', W') by a method drawn among three: bilinear and bicubic without an antialiasing filter, as the libraries
    of cameras and web sites do it, or the mean of the area."""
    mode = ("bilinear", "bicubic", "area")[int(rng.integers(3))]
    options = {} if mode == "area" else {"align_corners": False}
    size = (max(size[0], 1), max(size[1], 1))
    return F.interpolate(image[None], size=size, mode=mode, **options)[0]


# --- noise ------------------------------------------------------------------------------------------------------------


def add_noise(image: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    """Gaussian: with probability 0.4 independent in each channel, 0.4 the same in all, else correlated between them."""
    kind, shape = rng.random(), tuple(image.shape)
    if kind < 0.4 or shape[0] == 1:
        noise = np.broadcast_to(rng.standard_normal((1, *shape[1:])), shape)
    elif kind < 0.8:
        noise = rng.standard_normal(shape)
    else:
        # Random variances along random directions in the space of the channels.
        directions, _ = np.linalg.qr(rng.random((shape[0], shape[0])))
        mixing = directions * np.sqrt(rng.random(shape[0]))
        noise = np.einsum("cd,dhw->chw", mixing, rng.standard_normal(shape))
    return image + torch.from_numpy((deviation * noise).astype(np.float32))


def add_sensor_noise(image: Tensor, shot: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """Noise as a camera's sensor makes it: in linear light, before white balance, and with colours that are
    interpolated from a Bayer mosaic. Brooks et al. 2019, "Unprocessing images for learned raw denoising".

    shot: bounds of the variance at white, which is proportional to the light; the electronics add a constant one.
    """
    low, high = np.log(shot)
    log_shot = rng.uniform(low, high)
    log_read = 2.18 * log_shot + 1.2 + 0.26 * rng.standard_normal()  # their fit to real cameras
    linear = image.clamp(0, 1) ** 2.2
    channels = image.shape[0]
    gains = torch.ones(channels, 1, 1)
    if channels == 3:
        gains[0], gains[2] = rng.uniform(1.9, 2.4), rng.uniform(1.5, 1.9)
    raw = linear / gains
    variance = math.exp(log_shot) * raw + math.exp(log_read)
    raw = raw + variance.sqrt() * torch.from_numpy(rng.standard_normal(raw.shape).astype(np.float32))
    if channels == 3:
        raw = demosaiced(raw)
    return (raw * gains).clamp(0, 1) ** (1 / 2.2)


def demosaiced(raw: Tensor) -> Tensor:
    """(3, H, W) -> same: each place keeps the one channel that a Bayer filter (RG over GB) lets through, and the others
    are means of the neighbours that have them."""
    seen = torch.zeros_like(raw)
    seen[0, ::2, ::2] = seen[2, 1::2, 1::2] = 1
    seen[1, ::2, 1::2] = seen[1, 1::2, ::2] = 1
    around = torch.tensor([[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]])[None, None]
    total, count = (F.conv2d(values[:, None], around, padding=1)[:, 0] for values in (raw * seen, seen))
    # A picture of one row or column has places without any such neighbour.
    return torch.where((seen > 0) | (count == 0), raw, total / count.clamp(min=1e-6))


# --- compression ------------------------------------------------------------------------------------------------------


def jpeg(image: Tensor, quality: int) -> Tensor:
    """What is left of (C, H, W) of one or three channels after JPEG."""
    values = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(values[..., 0] if values.shape[2] == 1 else values).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as picture:
        back = np.array(picture)
    back = back[..., None] if back.ndim == 2 else back
    return torch.from_numpy(back.transpose(2, 0, 1).astype(np.float32) / 255)
