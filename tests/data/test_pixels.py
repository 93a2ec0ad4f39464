"""Images of any depth and number of channels as a data set: types, ranges, axes, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import pixels as picture
from picture_files import write, write_shard
from PIL import Image

from darkroom.data.batches import Batches, collate, ordered_batches
from darkroom.data.image_files import image_bytes
from darkroom.data.inspection import glimpse, inspect_source
from darkroom.data.io import contact_sheet, image_grid, preview, read_image
from darkroom.data.pixels import resolve_pixels
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.data.transforms import convert, decode, flip_example, resize, to_network
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat

UINT16, ANY_FLOAT = PixelFormat.of("uint16"), PixelFormat.of("float32", (0, 1))


def ramp(channels: int, dtype: str = "uint16", size: tuple[int, int] = (16, 12)) -> np.ndarray:
    """(H, W, C) that uses neighbouring values of the type: 8 bits would lose them."""
    width, height = size
    flat = np.arange(width * height * channels).reshape(height, width, channels)
    return (flat + 1000).astype(dtype) if dtype != "float32" else (flat / 7 - 20).astype(np.float32)


def folder_of(place: Path, images: list[np.ndarray], suffix: str = ".npy") -> str:
    for number, values in enumerate(images):
        write(place / f"{number}{suffix}", image_bytes(values, suffix))
    return str(place)


def settings(source: str, **changes: Any) -> DataConfig:
    return DataConfig(**({"source": source, "size": (16, 12), "validation": 0.0} | changes))


@pytest.mark.parametrize("suffix", [".png", ".npy", ".tif"])
def test_sixteen_bits_are_kept(tmp_path: Path, suffix: str) -> None:
    values = ramp(1)
    data = open_dataset(settings(folder_of(tmp_path, [values], suffix), channels=1, pixels="uint16"))
    image = data[0]["image"]
    assert image.dtype == torch.uint16 and np.array_equal(image.numpy()[0], values[..., 0])
    batch = collate([data[0]], data.pixels)["image"]
    assert torch.equal(data.pixels.from_network(batch)[0], image)
    assert np.array_equal(flip_example(data[0])["image"].numpy(), image.numpy()[..., ::-1])
    with pytest.raises(ValueError, match="uint16"):
        collate([data[0]])  # the format was forgotten


def test_bands_in_either_order_and_in_shards(tmp_path: Path) -> None:
    values = ramp(6, "float32")
    members = {}
    for name, array in (("a", values), ("b", np.ascontiguousarray(values.transpose(2, 0, 1)))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        members[f"{name}.npy"] = buffer.getvalue()
    source = write_shard(tmp_path / "set.tar", dict(members))
    data = open_dataset(settings(str(source), channels=6, pixels="float32"))
    assert len(data) == 2 and data.config.value_range == (float(values.min()), float(values.max()))
    for k in range(2):
        assert np.array_equal(data[k]["image"].numpy(), values.transpose(2, 0, 1))
    ends = next(ordered_batches(data, 2))["image"]
    assert ends.shape == (2, 6, 12, 16) and ends.min() == -1 and ends.max() == 1


def test_random_crops_and_flips_of_sixteen_bits(tmp_path: Path) -> None:
    source = folder_of(tmp_path, [ramp(2) + k for k in range(4)])
    data = open_dataset(settings(source, channels=2, pixels="uint16", flip=True, random_crop=8))
    batches = Batches(data, 4, seed=0)
    batch = torch.cat([batches.batch_at(step)["image"] for step in range(4)])
    assert batch.shape == (16, 2, 8, 8) and batch.dtype == torch.float32
    steps = (data.pixels.from_network(batch).int().diff(dim=-1)).unique().tolist()
    assert set(steps) == {-2, 2}  # neighbours differ by one pair, mirrored or not


def test_auto_takes_what_the_files_hold(tmp_path: Path) -> None:
    for name, dtype in (("a", "uint8"), ("b", "uint16"), ("c", "float32")):
        source = folder_of(tmp_path / name, [ramp(3, dtype)])
        assert open_dataset(settings(source, pixels="auto")).pixels.dtype == dtype
    assert resolve_pixels(settings("shapes", pixels="auto")).pixels == "uint8"
    for dtype in ("float32", "uint16"):
        with pytest.raises(DarkroomError, match="8 bits"):
            open_dataset(settings("shapes", pixels=dtype))


def test_the_range_is_that_of_the_training_images(tmp_path: Path) -> None:
    for part, top in (("train", 5.0), ("val", 9.0)):
        folder_of(tmp_path / part, [np.linspace(-2, top, 12 * 16, dtype=np.float32).reshape(12, 16, 1)])
    config = settings(str(tmp_path), channels=1, pixels="float32")
    train, validation = open_dataset(config), open_dataset(config, "validation")
    assert train.pixels == validation.pixels == PixelFormat.of("float32", (-2, 5))
    assert (
        train.digest != open_dataset(settings(str(tmp_path), channels=1, pixels="float32", value_range=(0, 1))).digest
    )


@pytest.mark.parametrize(
    ("image", "changes", "message"),
    [
        (ramp(4), {"channels": 6, "pixels": "uint16"}, "has 4 channels, data.channels is 6"),
        (ramp(6), {"channels": 3}, "has 6 channels, data.channels is 3"),
        (ramp(1, "float32"), {"channels": 1}, "set data.pixels to float32"),
        (ramp(1, "float32") * np.nan, {"channels": 1, "pixels": "float32", "value_range": (0, 1)}, "not finite"),
        (np.full((4, 4, 1), 7, np.float32), {"channels": 1, "pixels": "float32"}, "every value is 7"),
        (np.full((4, 4, 1), np.inf, np.float32), {"channels": 1, "pixels": "float32"}, "no image gives a value range"),
    ],
)
def test_images_that_do_not_fit(tmp_path: Path, image: np.ndarray, changes: Any, message: str) -> None:
    source = folder_of(tmp_path, [image])
    with pytest.raises(DarkroomError, match=message) as caught:
        open_dataset(settings(source, **changes))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_one_bad_image_is_left_out_and_listed(tmp_path: Path) -> None:
    source = folder_of(tmp_path, [ramp(6), ramp(4), ramp(6)])
    data = open_dataset(settings(source, channels=6, pixels="uint16"))
    assert len(data) == 2 and data.problems[0][0].endswith("1.npy") and "4 channels" in data.problems[0][1]


def test_arrays_beside_pictures_are_not_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.png", image_bytes(picture(0), ".png"))
        np.save(tmp_path / f"{name}.npy", np.zeros(512))  # an embedding
    assert len(open_dataset(settings(str(tmp_path)))) == 2
    shard = {"a.npy": b"no image", "a.png": image_bytes(picture(1), ".png")}
    assert len(open_dataset(settings(str(write_shard(tmp_path / "set.tar", dict(shard)))))) == 1


# --- the one rule at full depth -------------------------------------------------------------------------------------


def test_eight_bit_colour_is_as_it_was() -> None:
    data = image_bytes(picture(3, (40, 30)), ".png")
    with Image.open(io.BytesIO(data)) as image:
        expected = to_network(image, (16, 16))
    found, shape = decode(data, (16, 16))
    assert np.array_equal(found, expected) and shape == (40, 30)


def test_depths_are_converted_by_the_rule() -> None:
    grey = np.array([[[0], [257], [65535]]], np.uint16)
    eight = np.array([[[0], [1], [255]]], np.uint8)
    assert np.array_equal(decode(image_bytes(eight, ".png"), None, 1, UINT16)[0], grey.transpose(2, 0, 1))
    assert np.array_equal(decode(image_bytes(grey, ".npy"), None, 1)[0], eight.transpose(2, 0, 1))
    as_numbers = decode(image_bytes(grey, ".npy"), None, 1, ANY_FLOAT)[0]
    assert as_numbers.dtype == np.float32 and as_numbers.ravel().tolist() == [0, 257, 65535]


def test_channels_are_converted_by_the_rule() -> None:
    grey = ramp(1)
    assert np.array_equal(decode(image_bytes(grey, ".npy"), None, 3, UINT16)[0], grey.transpose(2, 0, 1).repeat(3, 0))
    colour = np.array([[[65535, 0, 0], [0, 65535, 0], [0, 0, 65535]]], np.uint16)
    luma = decode(image_bytes(colour, ".png"), None, 1, UINT16)[0]
    assert luma.ravel().tolist() == [19595, 38469, 7471]
    half = np.array([[[65535, 32768]]], np.uint16)  # white, half transparent, over black
    assert decode(image_bytes(half, ".png"), None, 1, UINT16, "black")[0].item() == 32768
    assert decode(image_bytes(half, ".png"), None, 2, UINT16)[0].ravel().tolist() == [65535, 32768]
    as_numbers = decode(image_bytes(half, ".png"), None, 1, ANY_FLOAT, "black")[0]
    assert as_numbers.item() == pytest.approx(32768)  # the numbers of the file, hence its white and its opacity


def test_resizing_keeps_what_eight_bits_lose() -> None:
    flat = np.linspace(30000, 30100, 64)[None, :, None].repeat(48, 0)
    small = resize(np.rint(flat).astype(np.uint16), (16, 12))
    assert small.dtype == np.uint16 and len(np.unique(small)) == 16
    expected = flat[0, :, 0].reshape(16, 4).mean(1)
    assert np.abs(small[6, 2:-2, 0] - expected[2:-2]).max() <= 1
    edge = np.zeros((8, 8, 6), np.float32)
    edge[:, 4:] = 1
    large = resize(edge, (32, 32))
    assert large.shape == (32, 32, 6) and large.min() == 0 and large.max() == 1  # no ringing beyond the picture's own


def test_resizing_eight_bits_by_planes_agrees_with_pillow() -> None:
    x, y = np.arange(40) / 40, np.arange(30)[:, None] / 30
    values = np.rint(np.stack([255 * x * y, 255 * x * (1 - y), 255 * y + 0 * x], 2)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(values).resize((16, 12), Image.Resampling.LANCZOS))
    assert np.abs(resize(values, (16, 12)).astype(int) - expected).max() <= 1


# --- looking at them ------------------------------------------------------------------------------------------------


def test_previews() -> None:
    assert preview(np.array([[0, 32768, 65535]], np.uint16), UINT16).ravel().tolist() == [0, 128, 255]
    six = np.full((2, 2, 6), 0.5, np.float32)
    assert preview(six, ANY_FLOAT).shape == (2, 2, 3) and preview(six, ANY_FLOAT).max() == 128
    assert preview(np.zeros((2, 2, 2), np.uint8)).shape == (2, 2, 1)
    assert image_grid(np.zeros((4, 5, 5, 6), np.float32), pixels=ANY_FLOAT).size == (12, 12)
    example = {"image": torch.zeros(6, 8, 8)}
    assert contact_sheet([example], pixels=ANY_FLOAT).size[0] >= 128


def test_inspection_and_glimpse(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "bands", [ramp(6, "float32"), ramp(6, "float32")])
    facts = inspect_source(source)
    assert facts["channels"] == {6: 2} and facts["bits"] == {"32 float": 2} and facts["values"][0] == -20
    assert any("data.channels to 6" in note for note in facts["notes"])
    assert any("data.pixels=float32" in note for note in facts["notes"])
    found = glimpse(source)
    assert found is not None and (found.channels, found.pixels, found.grey) == (6, "float32", False)
    grey = glimpse(folder_of(tmp_path / "grey", [ramp(1)], ".png"))
    assert grey is not None and (grey.channels, grey.pixels, grey.grey) == (1, "uint16", True)
    bad = folder_of(tmp_path / "bad", [ramp(1, "float32") * np.nan])
    assert "not finite" in inspect_source(bad)["problems"][0][1]


def test_read_image_at_full_depth(tmp_path: Path) -> None:
    values = ramp(1)
    path = write(tmp_path / "a.png", image_bytes(values, ".png"))
    assert np.array_equal(read_image(path, None, 1, pixels=UINT16), values)
    with pytest.raises(DarkroomError, match="has 1 channels"):
        read_image(path, None, 6, pixels=UINT16)


def test_convert_is_the_middle_of_decode() -> None:
    from darkroom.data.image_files import read_samples

    samples = read_samples(image_bytes(ramp(3), ".png"))
    assert np.array_equal(convert(samples, 3, UINT16), ramp(3))
