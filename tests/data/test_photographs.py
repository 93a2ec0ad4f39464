"""Photos keep their depth, opacity and colour profile."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from darkroom.data.image_files import image_bytes, read_text
from darkroom.data.photographs import Photograph, photograph_bytes, read_photograph, save_photograph
from darkroom.errors import DarkroomError

RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = RGB_PROFILE[:16] + b"GRAY" + RGB_PROFILE[20:]


def numbers(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_every_kind_comes_back(dtype: Any, channels: int, tmp_path: Path) -> None:
    values = numbers((5, 7, channels), dtype)
    (tmp_path / "a.png").write_bytes(image_bytes(values, ".png"))
    photo = read_photograph(tmp_path / "a.png")
    assert photo.values.dtype == dtype and (photo.alpha is not None) == (channels in (2, 4))
    again = photograph_bytes(photo, ".png", {"note": "ü"})
    (tmp_path / "b.png").write_bytes(again)
    back = read_photograph(tmp_path / "b.png")
    assert np.array_equal(back.values, photo.values) and photo.profile is None
    if photo.alpha is not None and back.alpha is not None:
        assert np.array_equal(np.concatenate([back.values, back.alpha], 2), values)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colour_profiles_go_along(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    Image.fromarray(numbers((6, 6, 3))).save(path, kind, icc_profile=RGB_PROFILE)
    photo = read_photograph(path)
    assert photo.profile == RGB_PROFILE
    with Image.open(io.BytesIO(photograph_bytes(photo, ".png", {"note": "x"}))) as picture:
        picture.load()
        assert picture.info["icc_profile"] == RGB_PROFILE and picture.info["note"] == "x"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("opacity", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_profiles_in_tiff_come_back(dtype: Any, opacity: bool, channels: int, tmp_path: Path) -> None:
    """Also of floating-point colour and 16-bit grey with opacity, which Pillow does not open."""
    values = (np.random.default_rng(0).random((5, 6, 4)) * 250).astype(dtype)
    profile = RGB_PROFILE if channels == 3 else GREY_PROFILE
    photo = Photograph(values[..., :channels], values[..., 3:] if opacity else None, profile)
    save_photograph(tmp_path / "a.tif", photo, {"Title": "t"})
    back = read_photograph(tmp_path / "a.tif")
    assert back.profile == profile and np.array_equal(back.values, photo.values) and back.values.dtype == dtype
    assert (back.alpha is None) == (photo.alpha is None)
    assert back.alpha is None or np.array_equal(back.alpha, photo.alpha)  # type: ignore[arg-type]
    with tifffile.TiffFile(tmp_path / "a.tif") as file:  # a profile of colours beside what is said to be colours
        assert file.pages[0].photometric == (2 if channels == 3 else 1)  # type: ignore[union-attr]
    save_photograph(tmp_path / "b.tif", Photograph(photo.values))
    assert read_photograph(tmp_path / "b.tif").profile is None


@pytest.mark.parametrize("tag", [(34675, 4, 1, 300_000_000), (34675, 3, 2, (700, 800)), (34675, 2, 4, "abc")])
def test_numbers_and_words_are_no_profile(tag: Any, tmp_path: Path) -> None:
    values = numbers((5, 6, 3)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", metadata=None, extratags=[(*tag, True)])
    photo = read_photograph(tmp_path / "a.tif")
    assert photo.profile is None and np.array_equal(photo.values, values)


def test_profiles_of_other_colours_are_left_behind(tmp_path: Path) -> None:
    cmyk = bytearray(RGB_PROFILE)
    cmyk[16:20] = b"CMYK"
    Image.fromarray(numbers((6, 6, 4)), "CMYK").save(tmp_path / "a.jpg", icc_profile=bytes(cmyk))
    photo = read_photograph(tmp_path / "a.jpg")
    assert photo.values.shape == (6, 6, 3) and photo.profile is None and photo.alpha is None


def test_frames_and_turns(tmp_path: Path) -> None:
    frames = [Image.fromarray(numbers((4, 6))) for _ in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (6, 4), k) for k in (9, 99)])
    assert read_photograph(tmp_path / "a.gif").frames == 3
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(numbers((4, 6, 3))).save(tmp_path / "b.png", exif=exif)
    assert read_photograph(tmp_path / "b.png").values.shape == (6, 4, 3)


def test_other_types_are_kept_or_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 4), np.float32))
    assert read_photograph(tmp_path / "a.npy").values.dtype == np.float32
    np.save(tmp_path / "b.npy", np.full((3, 4), 700, np.int64))
    assert read_photograph(tmp_path / "b.npy").values.dtype == np.uint16
    np.save(tmp_path / "c.npy", np.full((3, 4), -5, np.int64))
    with pytest.raises(DarkroomError, match="holds int64 numbers"):
        read_photograph(tmp_path / "c.npy")
    (tmp_path / "d.png").write_bytes(b"nothing")
    with pytest.raises(DarkroomError, match="not a picture that can be read"):
        read_photograph(tmp_path / "d.png")
    with pytest.raises(DarkroomError, match="no such file"):
        read_photograph(tmp_path / "absent.png")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3])
def test_opacity_in_tiff(channels: int, dtype: str, tmp_path: Path) -> None:
    """The last channel is said to be opacity, behind grey too, and read as that."""
    rng = np.random.default_rng(0)
    values = (rng.random((7, 9, channels + 1)) * (1 if dtype == "float32" else np.iinfo(dtype).max)).astype(dtype)
    photo = Photograph(values[..., :-1], values[..., -1:])
    save_photograph(tmp_path / "a.tif", photo, {"Title": "t"})
    back = read_photograph(tmp_path / "a.tif")
    assert back.alpha is not None and np.array_equal(back.alpha, photo.alpha)
    assert np.array_equal(back.values, photo.values) and back.values.dtype == dtype
    assert read_text(tmp_path / "a.tif") == {"Title": "t"}


@pytest.mark.parametrize("channels", [1, 3])
def test_opacity_in_exr(channels: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((7, 9, channels + 1)).astype(np.float32)
    photo = Photograph(values[..., :-1], values[..., -1:])
    save_photograph(tmp_path / "a.exr", photo)
    back = read_photograph(tmp_path / "a.exr")
    assert back.alpha is not None and np.array_equal(back.alpha, photo.alpha)
    assert np.array_equal(back.values, photo.values)
