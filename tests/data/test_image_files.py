"""Files at full depth: what is written is read back value for value; what cannot be used says so in one line."""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from darkroom.data.image_files import (
    as_image,
    channel_axis,
    check_suffix,
    default_suffix,
    image_bytes,
    read_samples,
    read_text,
    save_image,
    upright,
)
from darkroom.errors import DarkroomError

MOST = {"uint8": 255, "uint16": 65535}


def noise(channels: int, dtype: str, shape: tuple[int, int] = (9, 7), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(0, 100, (*shape, channels)).astype(np.float32)
    values = rng.integers(0, MOST[dtype] + 1, (*shape, channels))
    values.flat[:2] = 0, MOST[dtype]
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_round_trip(channels: int, dtype: str) -> None:
    values = noise(channels, dtype)
    for suffix in (".png", ".tif", ".npy", ".exr"):
        try:
            check_suffix(Path(f"x{suffix}"), channels, dtype)
        except DarkroomError:
            continue
        samples = read_samples(image_bytes(values, suffix), channels)
        assert samples.values.dtype == values.dtype and np.array_equal(samples.values, values), suffix
    assert suffix == ".exr"


def test_png16_is_what_another_reader_sees() -> None:
    """Pillow reads our 16-bit files: grey exactly, colour by its high bytes."""
    grey, colour = noise(1, "uint16"), noise(3, "uint16")
    with Image.open(io.BytesIO(image_bytes(grey, ".png", {"note": "schön"}))) as image:
        assert image.mode == "I;16" and np.array_equal(np.asarray(image), grey[..., 0])
        assert image.text["note"] == "schön"  # type: ignore[attr-defined]
    with Image.open(io.BytesIO(image_bytes(colour, ".png"))) as image:
        assert np.array_equal(np.asarray(image), colour >> 8)


@pytest.mark.parametrize("filter_type", range(5))
def test_png16_of_other_writers(filter_type: int) -> None:
    """Every filter of the format, written the slow way."""
    values = noise(3, "uint16", (6, 5))
    assert np.array_equal(read_samples(png16(values, filter_type)).values, values)


def png16(values: np.ndarray, filter_type: int) -> bytes:
    """16-bit RGB PNG by the specification (section 9), one filter for all rows."""
    height, width, _ = values.shape
    rows = np.frombuffer(values.astype(">u2").tobytes(), np.uint8).reshape(height, -1).astype(int)
    body = b""
    for y in range(height):
        body += bytes([filter_type])
        for x in range(rows.shape[1]):
            a = rows[y, x - 6] if x >= 6 else 0
            b = rows[y - 1, x] if y else 0
            c = rows[y - 1, x - 6] if y and x >= 6 else 0
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            body += bytes([(rows[y, x] - (0, a, b, (a + b) // 2, paeth)[filter_type]) % 256])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def test_tiff_of_other_writers() -> None:
    tifffile = pytest.importorskip("tifffile")
    bands = noise(6, "float32")

    def stored(array: np.ndarray, **options: Any) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, **options)
        return buffer.getvalue()

    planes = np.ascontiguousarray(bands.transpose(2, 0, 1))
    for data in (
        stored(bands, photometric="minisblack", planarconfig="contig"),
        stored(planes, photometric="minisblack", planarconfig="separate"),
        stored(planes, photometric="minisblack"),  # six pages
        stored(bands, photometric="minisblack", planarconfig="contig", byteorder=">", bigtiff=True),
    ):
        assert np.array_equal(read_samples(data, 6).values, bands)
    colour = noise(3, "uint16")
    assert np.array_equal(read_samples(stored(colour, photometric="rgb"), 3).values, colour)
    stack = noise(1, "uint16", (5, 9))[None, ..., 0].repeat(4, 0)
    stack[1:] = 7
    first = read_samples(stored(stack, photometric="minisblack"), 1).values
    assert np.array_equal(first[..., 0], stack[0])  # of a stack of pages the first
    signed = np.array([[-1000, 3000]], np.int16)
    assert read_samples(stored(signed), 1).values.ravel().tolist() == [-1000, 3000]


def test_pillow_tiff_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for dtype in ("uint8", "uint16", "float32"):
        values, buffer = noise(1, dtype), io.BytesIO()
        Image.fromarray(values[..., 0]).save(buffer, "TIFF")
        assert np.array_equal(read_samples(buffer.getvalue(), 1).values, values)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bands, colour = image_bytes(noise(6, "uint8"), ".tif"), image_bytes(noise(3, "float32"), ".exr")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    for data, name in ((bands, "tifffile"), (colour, "OpenEXR")):
        with pytest.raises(DarkroomError, match=rf"needs {name}: pip install .*images.*NPY"):
            read_samples(data, 6)
    with pytest.raises(DarkroomError, match="needs tifffile"):
        check_suffix(Path("x.tif"), 1, "uint8")
    assert default_suffix(6, "uint8") == ".npy"


def test_axes() -> None:
    assert channel_axis((8, 9), 1) is None
    assert channel_axis((8, 9, 6), 6) == 2 and channel_axis((6, 8, 9), 6) == 0
    assert channel_axis((6, 9, 6), 6) == 2  # both could be: the last
    assert channel_axis((4, 9, 5), None) == 0 and channel_axis((4, 9, 4), None) == 2  # the shorter
    assert channel_axis((512, 512, 3), 1) == 2  # not what is wanted, but clearly channels
    for shape in ((8,), (2, 3, 4, 5), (0, 8, 3)):
        with pytest.raises(ValueError, match="not an image"):
            channel_axis(shape, 3)
    with pytest.raises(ValueError, match="complex"):
        as_image(np.zeros((2, 2), complex), 1)
    assert as_image(np.array([[True, False]]), 1).ravel().tolist() == [255, 0]
    assert as_image(np.ones((2, 2), ">f4"), 1).dtype.isnative


@pytest.mark.parametrize("turn", range(1, 9))
def test_upright_is_what_exif_says(turn: int) -> None:
    values = noise(3, "uint8", (4, 6))
    picture = Image.fromarray(values)
    picture.getexif()[274] = turn
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=picture.getexif())
    with Image.open(buffer) as again:
        expected = np.asarray(ImageOps.exif_transpose(again))
    assert np.array_equal(upright(values, turn), expected)
    assert np.array_equal(read_samples(buffer.getvalue()).values, expected)


def test_opacity_is_known() -> None:
    for channels, alpha in ((1, False), (2, True), (3, False), (4, True)):
        for dtype in ("uint8", "uint16"):
            assert read_samples(image_bytes(noise(channels, dtype), ".png")).alpha is alpha
    assert read_samples(image_bytes(noise(4, "uint8"), ".tif")).alpha is True
    assert read_samples(image_bytes(noise(4, "uint8"), ".npy")).alpha is False  # four bands


def test_pickled_arrays_are_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        read_samples(buffer.getvalue())


@pytest.mark.parametrize(
    ("suffix", "channels", "dtype"),
    [(".png", 3, "uint8"), (".tif", 3, "uint8"), (".tif", 6, "uint16"), (".exr", 3, "float32")],
)
def test_files_that_claim_too_much_are_refused(
    suffix: str, channels: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = image_bytes(noise(channels, dtype), suffix)
    assert read_samples(data).values.shape == (9, 7, channels)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"has more than 40 pixels|says that it holds 9 x 7 x [36] numbers"):
        read_samples(data)


def test_arrays_that_are_cut_off_take_no_memory() -> None:
    data = image_bytes(noise(4, "uint8"), ".npy")
    with pytest.raises(ValueError, match="cut off"):
        read_samples(data[:-1])
    assert b"(9, 7, 4)" in data
    with pytest.raises(ValueError, match="cut off"):  # 504 TB
        read_samples(data.replace(b"(9, 7, 4), }          ", b"(9000000, 7000000, 8)}"))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_of_each_version(version: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, noise(2, "uint16"), version=version)
    np.testing.assert_array_equal(read_samples(buffer.getvalue()).values, noise(2, "uint16"))


@pytest.mark.parametrize("suffix", [".tif", ".npy", ".exr", ".png"])
def test_notes_travel(tmp_path: Path, suffix: str) -> None:
    from darkroom.png_settings import read_png_text

    path, text = tmp_path / f"x{suffix}", {"parameters": "a fox, größer\nSteps: 3", "darkroom": json.dumps({"a": [1]})}
    values = noise(1, "float32" if suffix == ".exr" else "uint16")
    save_image(path, values, text)
    assert read_png_text(path) == text
    assert np.array_equal(read_samples(path.read_bytes(), 1).values, values)
    if suffix != ".png":
        assert read_text(path) == text
    save_image(tmp_path / f"bare{suffix}", values)
    assert read_png_text(tmp_path / f"bare{suffix}") == {}


@pytest.mark.parametrize(
    ("name", "channels", "dtype", "message"),
    [
        ("x.png", 6, "uint8", "6-channel uint8 images; write .tif or .npy"),
        ("x.png", 1, "float32", "PNG cannot hold"),
        ("x.exr", 1, "uint16", "EXR would turn"),
        ("x.jpg", 3, "uint8", "images are written as"),
    ],
)
def test_types_that_cannot_hold_an_image(name: str, channels: int, dtype: str, message: str) -> None:
    with pytest.raises(DarkroomError, match=message):
        check_suffix(Path(name), channels, dtype)
    assert default_suffix(1, "uint16") == ".png" and default_suffix(1, "float32") == ".tif"
