"""The BSR pipeline: each of its parts against closed forms or libraries, and that its damage follows from a seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from picture_files import pixels

from darkroom.config import from_dict
from darkroom.data.batches import Batches, collate
from darkroom.data.blind_degradation import (
    STRENGTHS,
    add_noise,
    add_sensor_noise,
    degrade_blindly,
    demosaiced,
    filtered,
    gaussian_kernel,
    jpeg,
)
from darkroom.data.degradations import LowResolution, degrade
from darkroom.data.io import write_png
from darkroom.data.latent_cache import LatentCache
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.data.transforms import flip_example
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(channels: int = 3, size: tuple[int, int] = (64, 48), seed: int = 3) -> torch.Tensor:
    """(C, H, W) smooth, with an edge, in [0, 1]."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    planes = [0.5 + 0.3 * np.sin(0.1 * x + k) + 0.2 * np.sign(y - height / 2 + k) for k in range(channels)]
    return torch.from_numpy(np.clip(np.stack(planes), 0, 1).astype(np.float32))


# ---- blur


def test_kernels_have_the_variances_that_were_asked_for() -> None:
    kernel = gaussian_kernel(41, 9.0, 2.0, angle=0.5).double().numpy()
    offsets = np.arange(41) - 20
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    direction, across = np.array([math.cos(0.5), math.sin(0.5)]), np.array([-math.sin(0.5), math.cos(0.5)])
    x, y = np.meshgrid(offsets, offsets)
    for axis, variance in ((direction, 9.0), (across, 2.0)):
        assert (kernel * (axis[0] * x + axis[1] * y) ** 2).sum() == pytest.approx(variance, rel=0.02)
    shifted = gaussian_kernel(25, 4.0, 4.0, shift=1.5).numpy()
    centre = np.arange(25) - 12
    assert (shifted.sum(0) * centre).sum() == pytest.approx(1.5, abs=1e-3)
    assert (shifted.sum(1) * centre).sum() == pytest.approx(1.5, abs=1e-3)
    point = gaussian_kernel(7, 0.0, 0.0)
    assert float(point[3, 3]) == pytest.approx(1, abs=1e-6)  # no blur at all, and no division by 0


@pytest.mark.parametrize("size", [(40, 31), (5, 3), (1, 1), (1, 9)])
def test_filtering_is_that_of_scipy(size: tuple[int, int]) -> None:
    image = torch.from_numpy(rng().random((3, size[1], size[0])).astype(np.float32))
    kernel = gaussian_kernel(15, 6.0, 1.0, angle=1.0, shift=0.5)
    ours = filtered(image, kernel)
    for mine, plane in zip(ours.numpy(), image.numpy(), strict=True):
        theirs = scipy.ndimage.correlate(plane.astype(np.float64), kernel.double().numpy(), mode="mirror")
        assert np.abs(mine - theirs).max() < 1e-5


# ---- noise


def test_noise_has_the_deviation_and_the_three_kinds() -> None:
    flat, same, free, mixed = torch.full((3, 120, 120), 0.5), 0, 0, 0
    for seed in range(60):
        noise = (add_noise(flat, 0.05, rng(seed)) - flat).numpy().reshape(3, -1)
        correlation = np.corrcoef(noise)[np.triu_indices(3, 1)]
        deviations = noise.std(1)
        if (np.abs(correlation) > 0.99).all():
            same += 1
            assert deviations == pytest.approx(0.05, rel=0.05)
        elif (np.abs(correlation) < 0.05).all():
            free += 1
            assert deviations == pytest.approx(0.05, rel=0.05)
        else:
            mixed += 1
            assert (deviations < 0.055).all()
    assert same > 12 and free > 12 and mixed > 4
    assert add_noise(torch.zeros(1, 4, 4), 0.1, rng()).shape == (1, 4, 4)


def test_sensor_noise_grows_with_the_light_and_keeps_the_mean() -> None:
    """Colours that are equal everywhere: what the mosaic interpolates is then noise alone."""
    spread = []
    for value in (0.2, 0.8):
        flat = torch.full((3, 200, 200), value)
        noisy = add_sensor_noise(flat, (0.001, 0.001), rng(1))
        linear = noisy**2.2
        assert linear.mean(dim=(1, 2)).tolist() == pytest.approx([value**2.2] * 3, rel=0.02)
        spread.append(float(linear[1].std()))
    assert spread[1] > 1.5 * spread[0]
    assert add_sensor_noise(torch.rand(1, 5, 5), (0.001, 0.01), rng()).shape == (1, 5, 5)


def test_a_mosaic_of_a_plane_is_the_plane() -> None:
    """Bilinear interpolation is exact where values rise evenly; at the border means of what is there stand in."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    planes = torch.stack([x, y, x + 2 * y])
    back = demosaiced(planes)
    torch.testing.assert_close(back[:, 1:-1, 1:-1], planes[:, 1:-1, 1:-1])
    noisy = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    kept = demosaiced(noisy)
    for channel, rows, columns in ((0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 1, 1)):  # what a filter lets through stays
        assert torch.equal(kept[channel, rows::2, columns::2], noisy[channel, rows::2, columns::2])
    one = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    torch.testing.assert_close(demosaiced(one), one)


def test_jpeg_of_few_bits_loses_more() -> None:
    image = torch.from_numpy(pixels(1, (32, 32)).transpose(2, 0, 1).astype(np.float32) / 255)
    losses = [float((jpeg(image, quality) - image).abs().mean()) for quality in (95, 30)]
    assert 0 < losses[0] < losses[1]
    grey = jpeg(torch.full((1, 9, 7), 0.5), 90)
    assert grey.shape == (1, 9, 7) and float((grey - 0.5).abs().max()) < 0.01


# ---- the whole


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize(
    ("factor", "channels", "size"), [(4, 3, (64, 48)), (2, 1, (9, 7)), (1, 3, (20, 20)), (4, 3, (3, 2))]
)
def test_sizes_ranges_and_seeds(name: str, factor: int, channels: int, size: tuple[int, int]) -> None:
    image = picture(channels, size)
    made = [degrade_blindly(image, factor, STRENGTHS[name], rng(seed)) for seed in range(25)]
    shape = (channels, -(-size[1] // factor), -(-size[0] // factor))
    assert all(m.shape == shape and m.isfinite().all() and m.min() >= 0 and m.max() <= 1 for m in made)
    assert torch.equal(made[7], degrade_blindly(image, factor, STRENGTHS[name], rng(7)))
    if min(shape[1:]) > 1:
        assert len({m.numpy().tobytes() for m in made}) > 20


def test_light_damage_is_lighter_and_neither_shifts_the_picture() -> None:
    image = picture(3, (128, 128))
    plain = degrade(image, LowResolution(4))
    errors = {}
    for name, strength in STRENGTHS.items():
        made = torch.stack([degrade_blindly(image, 4, strength, rng(seed)) for seed in range(60)])
        errors[name] = float((made - plain).square().mean().sqrt())
        # The mean over many draws lies on the picture: no draw moves it to one side.
        mean = made.mean(0)
        error = [float((torch.roll(mean, step, 2) - plain)[:, 2:-2, 2:-2].abs().mean()) for step in (-1, 0, 1)]
        assert error[1] < error[0] and error[1] < error[2]
        assert float((mean - plain).mean().abs()) < 0.02
    assert errors["bsr-light"] < 0.7 * errors["bsr"]


def test_every_pixel_type_keeps_its_range() -> None:
    deep = (picture(1) * 65535).to(torch.int32).to(torch.uint16)
    made = degrade(deep, LowResolution(2, pipeline="bsr"), rng(), PixelFormat.of("uint16"))
    assert made.dtype == torch.uint16 and abs(float(made.float().mean()) - float(deep.float().mean())) < 6000
    warm = picture(1) * 10 + 280
    made = degrade(warm, LowResolution(2, pipeline="bsr"), rng(), PixelFormat("float32", 270, 300))
    assert made.dtype == torch.float32 and float(made.min()) >= 270 and float(made.max()) <= 300
    assert abs(float(made.mean()) - 285) < 3
    with pytest.raises(ValueError, match="needs a generator"):
        degrade(warm, LowResolution(1, blur=(1.0, 2.0)))


def test_blur_is_drawn_from_its_range() -> None:
    image = picture()
    made = [degrade(image, LowResolution(1, blur=(0.5, 3.0)), rng(seed)) for seed in range(20)]
    soft = [float((m - image).abs().mean()) for m in made]
    assert len(set(soft)) == 20 and all(m.shape == image.shape for m in made)
    ends = [float((degrade(image, LowResolution(1, blur=b)) - image).abs().mean()) for b in (0.5, 3.0)]
    assert ends[0] <= min(soft) < max(soft) <= ends[1]
    rule = from_dict(LowResolution, {"factor": 1, "blur": [0.5, 3]})
    assert rule.is_random and rule.blur_range == (0.5, 3) and not LowResolution().is_random


def test_many_bands_have_no_jpeg() -> None:
    with pytest.raises(DarkroomError, match=r"has 1 or 3 channels, and data\.channels is 6"):
        open_dataset(DataConfig("bands6", size=16, channels=6, pixels="float32", low_resolution=BLIND, count=3))


# ---- in batches

BLIND = LowResolution(4, pipeline="bsr-light")


def config(**options: Any) -> DataConfig:
    return DataConfig(**{"count": 8, "size": 32, "low_resolution": BLIND, **options})


def test_damage_belongs_to_the_example_and_is_redrawn_for_batches() -> None:
    data = open_dataset(config())
    assert data.redraws and not open_dataset(config(low_resolution=LowResolution())).redraws
    assert torch.equal(data[2]["low_resolution"], data[2]["low_resolution"])
    other = data.redrawn(2, rng(), flip=True)
    assert not torch.equal(other["low_resolution"], flip_example(data[2])["low_resolution"])
    assert torch.equal(other["image"], flip_example(data[2])["image"])
    batches, seen = Batches(data, 4, seed=1), {i: set() for i in range(8)}
    for step in range(4):
        batch = batches.batch_at(step)
        again = Batches(data, 4, seed=1).batch_at(step)
        assert torch.equal(batch["low_resolution"], again["low_resolution"])
        for i, low in zip(batches.indices(step), batch["low_resolution"], strict=True):
            seen[i].add(low.numpy().tobytes())
    assert all(len(draws) == 2 for draws in seen.values())  # two epochs
    halves = [Batches(data, 2, seed=1, rank=r, world_size=2).batch_at(3)["low_resolution"] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), batches.batch_at(3)["low_resolution"])
    still = Batches(data, 4, seed=1, augment=False)
    expected = collate([data[i] for i in still.indices(0)], data.pixels)
    assert torch.equal(still.batch_at(0)["low_resolution"], expected["low_resolution"])


def test_a_latent_cache_redraws_too(tmp_path: Path) -> None:
    for i in range(4):
        write_png(tmp_path / "data" / f"{i}.png", pixels(i, (32, 32)))
    data = open_dataset(DataConfig(str(tmp_path / "data"), size=32, validation=0.0, flip=True, low_resolution=BLIND))

    def encode(images: torch.Tensor) -> torch.Tensor:
        return images[:, :2, ::4, ::4]

    options: dict[str, Any] = {"autoencoder": "x"}
    cache = LatentCache.build(data, encode, tmp_path / "cache", wanted=["low_resolution"], **options)
    assert cache.redraws
    example = cache.redrawn(1, rng(5), flip=True)
    assert set(example) == {"moments", "low_resolution"}
    assert torch.equal(example["low_resolution"], data.redrawn(1, rng(5), flip=True)["low_resolution"])
    assert torch.equal(example["moments"], cache.example(1, flip=True)["moments"])
    first, second = (Batches(cache, 4, seed=0).batch_at(step)["low_resolution"] for step in (0, 1))
    assert first.shape == (4, 3, 8, 8) and not torch.equal(first.sort(0)[0], second.sort(0)[0])
    without = LatentCache.build(data, encode, tmp_path / "cache", wanted=["image"], **options)
    assert not without.redraws


def test_the_record_of_a_data_set_says_how_its_pictures_were_made() -> None:
    described = open_dataset(config()).describe()
    assert from_dict(LowResolution, described["low_resolution"]) == BLIND
    assert "low_resolution" not in open_dataset(config(low_resolution=None)).describe()
