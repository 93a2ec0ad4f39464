"""Image files at their full depth, in and out: PNG of 8 and 16 bits, TIFF of any bands, NPY, EXR.

What Pillow reads without loss is read by Pillow. 16-bit colour PNG goes through Pillow's decoder in two halves; other
TIFF needs tifffile, EXR needs OpenEXR (both in the extra `images`), NPY needs nothing.
Shapes: H W image size, C channels.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from darkroom.errors import DarkroomError
from darkroom.safe_files import write_file

ARRAY_SUFFIXES = (".npy", ".exr")
DEEP_SUFFIXES = (".tif", ".tiff", *ARRAY_SUFFIXES)  # what may hold more than Pillow can read
OUTPUT_SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".exr")
EXTRA = 'pip install "darkroom-ldm[images]"'
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY, _EXR, _PNG = b"\x93NUMPY", b"v/1\x01", b"\x89PNG\r\n\x1a\n"
# Pillow modes that hold what the file holds, as long as its samples have 8 bits where the mode has 8.
_EXACT = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1, "I;16B": 1, "I;16L": 1, "I": 1, "F": 1}
_ORIENTATION, _BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _ICC_PROFILE = 274, 258, 277, 34675
_PNG_COLOUR = {2: "RGB", 4: "LA", 6: "RGBA"}  # by the colour type in the header, byte 25


@dataclass(frozen=True)
class Samples:
    """values: (H, W, C) in the type of the file, upright; alpha: whether the last channel is opacity; format: for
    people; rotated: whether EXIF turned it."""

    values: np.ndarray
    alpha: bool
    format: str
    rotated: bool = False


# --- reading ----------------------------------------------------------------------------------------------------------


def is_array_file(data: bytes) -> bool:
    """Whether these bytes are an array (NPY, EXR) and no picture that Pillow knows."""
    return data.startswith((_NPY, _EXR))


def read_samples(data: bytes, channels: int | None = None) -> Samples:
    """The numbers of an image file as they are. Palettes are resolved; CMYK, YCbCr and Lab become RGB.

    channels: how many are wanted; it decides which axis of an array they are.
    Raises ValueError for what cannot be used or claims more pixels than `most_pixels`, before memory is taken for them;
    DarkroomError when a library is missing.
    """
    try:
        return _read(data, channels)
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {most_pixels():,} pixels; cut it into parts or scale it down") from None


def most_pixels() -> int:
    """Height times width up to which a file is read: Pillow's bound against files that claim more than they hold."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 2**62)


def _check_claim(shape: Sequence[int], itemsize: int) -> None:
    """A file says how large its array is before it says what is in it: as much as RGBA of most_pixels in float32."""
    if math.prod(shape) * itemsize > 16 * most_pixels():
        claim = " x ".join(map(str, shape))
        raise ValueError(f"says that it holds {claim} numbers, too many to read; cut it into parts or scale it down")


def _read(data: bytes, channels: int | None) -> Samples:
    if data.startswith(_NPY):
        return _read_npy(data, channels)
    if data.startswith(_EXR):
        return _read_exr(data)
    if data.startswith(_TIFF):
        return _read_tiff(data, channels)
    with Image.open(io.BytesIO(data)) as image:
        turn = image.getexif().get(_ORIENTATION, 1)
        if image.format == "PNG" and _png_bits(data) == 16 and image.mode in ("RGB", "RGBA"):
            values, alpha = _read_png16(data, image)
        else:
            values, alpha = _from_pillow(image)
        return Samples(upright(values, turn), alpha, str(image.format), turn != 1)


def channel_axis(shape: tuple[int, ...], channels: int | None) -> int | None:
    """Which axis of an array are its channels: None for (H, W), else 2 or 0.

    The axis whose length is the wanted number of channels; the last, where both are. Where neither is (or nothing is
    wanted), the shorter of the two, and the last where they are equal.
    """
    if len(shape) == 2:
        return None
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"an array of shape {shape} is not an image; use (H, W), (H, W, C) or (C, H, W)")
    if channels is not None and channels in (shape[0], shape[2]):
        return 2 if shape[2] == channels else 0
    return 2 if shape[2] <= shape[0] else 0


def as_image(array: np.ndarray, channels: int | None) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C), of a native numeric type."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an array of type {array.dtype} is not an image; use integers or floating point")
    axis = channel_axis(array.shape, channels)
    image = array[..., None] if axis is None else np.moveaxis(array, axis, 2)
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255)
    return image.astype(image.dtype.newbyteorder("="), copy=False)


def upright(values: np.ndarray, turn: int) -> np.ndarray:
    """(H, W, C) turned as an EXIF orientation (1 to 8) says."""
    if turn in (5, 6, 7, 8):
        values = values.transpose(1, 0, 2)
    if turn in (3, 4, 7, 8):
        values = values[::-1]
    if turn in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def _from_pillow(image: Image.Image) -> tuple[np.ndarray, bool]:
    """(H, W, C) and whether the last channel is opacity."""
    seen_through = "transparency" in image.info and image.mode in ("L", "P", "RGB")
    if seen_through or image.mode in ("La", "RGBa", "PA"):
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in _EXACT:
        image = image.convert("RGB")
    values = np.asarray(image)
    alpha = image.mode in ("LA", "RGBA")
    return (values[..., None] if values.ndim == 2 else values), alpha


def _png_bits(data: bytes) -> int:
    return data[24] if data.startswith(_PNG) and len(data) > 24 else 0


def _read_png16(data: bytes, image: Any) -> tuple[np.ndarray, bool]:
    """16-bit PNG of several channels, (H, W, C) uint16.

    Pillow keeps the high byte of such samples. Read as if they were little-endian it keeps the low byte: two passes
    of its decoder give both. Grey with opacity has four bytes a pixel, like 8-bit RGBA.
    """
    stored = _PNG_COLOUR[data[25]]
    if stored == "LA":
        raw = np.ascontiguousarray(_decoded(data, "RGBA"))
        return raw.view(">u2").astype(np.uint16), True
    high = _decoded(data, f"{stored};16B").astype(np.uint16)
    values = high << 8 | _decoded(data, f"{stored};16L")
    key = image.info.get("transparency")
    if stored == "RGB" and isinstance(key, tuple):  # one colour that is see-through
        opaque = (values != np.array(key, np.uint16)).any(2, keepdims=True)
        return np.concatenate([values, opaque.astype(np.uint16) * np.uint16(65535)], 2), True
    return values, stored == "RGBA"


def _decoded(data: bytes, raw_mode: str) -> np.ndarray:
    """The PNG as Pillow decodes it when its samples are taken for `raw_mode`."""
    with Image.open(io.BytesIO(data)) as opened:
        image: Any = opened
        tile = image.tile[0]
        image.tile = [tile._replace(args=raw_mode) if hasattr(tile, "_replace") else (*tile[:3], raw_mode)]
        return np.asarray(image)


def _read_npy(data: bytes, channels: int | None) -> Samples:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects, not numbers; save it with a numeric dtype")
    if math.prod(shape) * dtype.itemsize > len(data) - file.tell():  # numpy takes memory for what the header says
        raise ValueError("is cut off: its header says that it holds more numbers than there are; write it again")
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return Samples(as_image(array, channels), False, "NPY")


def _read_tiff(data: bytes, channels: int | None) -> Samples:
    found = _tiff_by_pillow(data, channels)
    if found is not None:
        return found
    tifffile = _library("tifffile", "this kind of TIFF")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page, series = file.pages[0], file.series[0]
        _check_claim(series.shape, series.dtype.itemsize)
        array = series.asarray()
        if array.ndim == 3 and len(file.pages) == array.shape[0] and channels not in (None, array.shape[0]):
            array = page.asarray()  # a stack of pages, of which the first is taken
        if array.ndim > 3:
            array = array.reshape([n for n in array.shape if n != 1] or [1, 1])
        extra = page.tags.get("ExtraSamples")
        alpha = extra is not None and int(np.ravel(extra.value)[-1]) in (1, 2) and array.shape[-1] in (2, 4)
        turn = int(page.tags["Orientation"].value) if "Orientation" in page.tags else 1
    return Samples(upright(as_image(array, channels), turn), alpha, "TIFF", turn != 1)


def tiff_facts(data: bytes) -> tuple[bytes | None, int]:
    """ICC profile and number of pages of a TIFF, also of the kinds that Pillow does not open, such as floating-point
    colour or 16-bit grey with opacity."""
    with _library("tifffile", "this kind of TIFF").TiffFile(io.BytesIO(data)) as file:
        tag = file.pages[0].tags.get(_ICC_PROFILE)
        found = None if tag is None else tag.value
        return (found if isinstance(found, bytes) else None), len(file.pages)  # numbers are no profile


def _tiff_by_pillow(data: bytes, channels: int | None) -> Samples | None:
    """What Pillow reads without loss, and its many compressions with it; else None."""
    if not data.startswith(_TIFF[:2]):  # beyond 4 GB, which it reads in part
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            pages, tags = getattr(image, "n_frames", 1), image.tag_v2  # type: ignore[attr-defined]
            bits = set(np.ravel(tags.get(_BITS_PER_SAMPLE, 1)))
            exact = image.mode[0] in "IF" or bits <= {1, 2, 4, 8}
            whole = len(image.getbands()) == tags.get(_SAMPLES_PER_PIXEL, 1) and image.mode != "RGBX"
            if not (exact and whole) or (pages > 1 and channels not in (1, 3)):
                return None
            turn = tags.get(_ORIENTATION, 1)
            values, alpha = _from_pillow(image)
            return Samples(upright(values, turn), alpha, "TIFF", turn != 1)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return None


def _read_exr(data: bytes) -> Samples:
    """Channels R, G, B, A first, then the others by name."""
    openexr = _library("OpenEXR", "EXR")
    with tempfile.TemporaryDirectory() as folder:  # the library takes names only
        path = Path(folder, "image.exr")
        path.write_bytes(data)
        with openexr.File(str(path), header_only=True) as file:
            header = file.header()
            (left, top), (right, bottom) = header["dataWindow"]
            _check_claim((int(bottom) - int(top) + 1, int(right) - int(left) + 1, len(header["channels"])), 4)
        with openexr.File(str(path), separate_channels=True) as file:
            planes = {name: np.array(channel.pixels) for name, channel in file.channels().items()}
    order = [name for name in "RGBA" if name in planes] + sorted(set(planes) - set("RGBA"))
    if set(order) == set("YA"):  # grey with opacity
        order = ["Y", "A"]
    if len({plane.shape for plane in planes.values()}) != 1:
        raise ValueError("its EXR channels have different sizes; write them at full size")
    return Samples(np.stack([planes[name] for name in order], 2), order[-1] == "A", "EXR")


def _library(name: str, what: str) -> ModuleType:
    """An optional library, or the cure."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise DarkroomError(f"{what} needs {name}: {EXTRA}, or convert the files to NPY or 16-bit PNG") from None


# --- writing ----------------------------------------------------------------------------------------------------------


def default_suffix(channels: int, dtype: str) -> str:
    """The file type that holds such images: PNG where it can, else TIFF, or NPY where tifffile is not installed."""
    if dtype != "float32" and channels <= 4:
        return ".png"
    try:
        _library("tifffile", "TIFF")
    except DarkroomError:
        return ".npy"
    return ".tif"


def check_suffix(path: Path, channels: int, dtype: str) -> None:
    """Complain before any work is done when this file type cannot hold images of this kind."""
    suffix = path.suffix.lower()
    kind = f"{channels}-channel {dtype}"
    if suffix not in OUTPUT_SUFFIXES:
        raise DarkroomError(f"{path}: images are written as {', '.join(OUTPUT_SUFFIXES)}; rename the output")
    if suffix == ".png" and (channels > 4 or dtype == "float32"):
        raise DarkroomError(f"{path}: PNG cannot hold {kind} images; write .tif or .npy")
    if suffix == ".exr" and dtype != "float32":
        raise DarkroomError(f"{path}: EXR would turn {kind} images into floating point; write .png, .tif or .npy")
    if suffix in (".tif", ".tiff"):
        _library("tifffile", "writing TIFF")
    if suffix == ".exr":
        _library("OpenEXR", "writing EXR")


def image_bytes(
    values: np.ndarray,
    suffix: str,
    text: Mapping[str, str] | None = None,
    alpha: bool | None = None,
    profile: bytes | None = None,
) -> bytes:
    """File content for (H, W), (H, W, C) of uint8, uint16 or float32.

    text: notes by keyword; text chunks of PNG, a JSON description in TIFF and EXR, nowhere in NPY (see `save_image`).
    alpha: whether the last channel is opacity, where the type of file can say so; None: if there are four of integers.
    profile: the ICC profile of the colours, which PNG and TIFF hold.
    """
    values = np.ascontiguousarray(values[..., None] if values.ndim == 2 else values)
    if values.ndim != 3 or str(values.dtype) not in ("uint8", "uint16", "float32"):
        raise ValueError(f"an image is uint8, uint16 or float32 (H, W, C), got {values.dtype} {values.shape}")
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, values[..., 0] if values.shape[2] == 1 else values, allow_pickle=False)
        return buffer.getvalue()
    if suffix in (".tif", ".tiff"):
        return _tiff_bytes(values, text, alpha, profile)
    if suffix == ".exr":
        return _exr_bytes(values, text, alpha)
    if suffix != ".png" or values.shape[2] > 4 or values.dtype == np.float32:
        raise ValueError(f"{suffix} cannot hold {values.dtype} {values.shape}")
    png = _png16_bytes(values, text) if values.dtype == np.uint16 else _png8_bytes(values, text)
    if profile is None:
        return png
    after = len(_PNG) + 25  # signature and header: the profile stands before the pixels
    return png[:after] + png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)) + png[after:]


def save_image(path: str | Path, values: np.ndarray, text: Mapping[str, str] | None = None) -> None:
    """Write an image atomically in the type that the name says. The text of an NPY goes into a JSON file beside it."""
    path = Path(path)
    check_suffix(path, 1 if values.ndim == 2 else values.shape[2], str(values.dtype))
    write_image_file(path, image_bytes(values, path.suffix.lower(), text), text)


def write_image_file(path: Path, content: bytes, text: Mapping[str, str] | None) -> None:
    """Write an image's file, and beside an NPY, which holds no text, a JSON file with it."""
    write_file(path, content)
    if path.suffix.lower() == ".npy" and text:
        write_file(path.with_suffix(".json"), json.dumps(dict(text), indent=1).encode())


def read_text(path: str | Path) -> dict[str, str]:
    """The notes that `save_image` wrote into a TIFF or EXR, or beside an NPY. Raises OSError, ValueError."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        beside = path.with_suffix(".json")
        stored = beside.read_text(encoding="utf-8") if beside.is_file() else ""
    elif suffix == ".exr":
        with _library("OpenEXR", "EXR").File(str(path)) as file:
            stored = str(file.header().get("comments", ""))
    else:
        with _library("tifffile", "TIFF").TiffFile(str(path)) as file:
            stored = str(file.pages[0].description)
    try:
        notes = json.loads(stored)
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in notes.items()} if isinstance(notes, dict) else {}


def png_info(text: Mapping[str, str] | None) -> PngImagePlugin.PngInfo:
    """Text chunks of a PNG (international text, so any Unicode)."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    return info


def _png8_bytes(values: np.ndarray, text: Mapping[str, str] | None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values[..., 0] if values.shape[2] == 1 else values).save(buffer, "PNG", pnginfo=png_info(text))
    return buffer.getvalue()


def _png16_bytes(values: np.ndarray, text: Mapping[str, str] | None) -> bytes:
    """PNG of 16 bits, which Pillow writes for grey only. Rows are stored as differences to the row above (filter 2)."""
    height, width, channels = values.shape
    rows = np.frombuffer(values.astype(">u2").tobytes(), np.uint8).reshape(height, -1)
    differences = rows.copy()
    differences[1:] -= rows[:-1]
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), differences], 1)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = [_PNG, png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    for key, value in (text or {}).items():
        parts.append(png_chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + value.encode("utf-8")))
    parts += [png_chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)), png_chunk(b"IEND", b"")]
    return b"".join(parts)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One part of a PNG: length, kind, data, checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tiff_bytes(values: np.ndarray, text: Mapping[str, str] | None, alpha: bool | None, profile: bytes | None) -> bytes:
    tifffile = _library("tifffile", "writing TIFF")
    buffer = io.BytesIO()
    channels, whole = values.shape[2], values.dtype != np.float32
    opacity = channels in (2, 4) and (whole and channels == 4 if alpha is None else alpha)
    rgb = channels - opacity == 3 and (whole or opacity or (profile is not None and profile[16:20] == b"RGB "))
    tifffile.imwrite(
        buffer,
        values[..., 0] if channels == 1 else values,
        photometric="rgb" if rgb else "minisblack",
        planarconfig=None if channels == 1 else "contig",
        extrasamples=["unassalpha"] if opacity else None,
        compression="zlib",
        description=json.dumps(dict(text)) if text else None,
        metadata=None,
        software="Darkroom",
        iccprofile=profile,
    )
    return buffer.getvalue()


def _exr_bytes(values: np.ndarray, text: Mapping[str, str] | None, alpha: bool | None) -> bytes:
    openexr = _library("OpenEXR", "writing EXR")
    count = values.shape[2]
    width = len(str(count - 1))  # so that names sort like the bands
    names = {1: ["Y"], 3: ["R", "G", "B"], 4: ["R", "G", "B", "A"]}.get(count)
    if alpha and count == 2:
        names = ["Y", "A"]
    names = names or [f"band{i:0{width}d}" for i in range(count)]
    header: dict[str, Any] = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
    if text:
        header["comments"] = json.dumps(dict(text))
    channels = {name: np.ascontiguousarray(values[..., i]) for i, name in enumerate(names)}
    handle, name = tempfile.mkstemp(suffix=".exr")
    os.close(handle)
    try:
        openexr.File(header, channels).write(name)
        return Path(name).read_bytes()
    finally:
        os.unlink(name)
