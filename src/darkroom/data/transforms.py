"""The one rule by which a picture becomes what the network sees, and the augmentations of a batch.

Shapes: C channels, H W image size.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from darkroom.data.image_files import Samples, is_array_file, read_samples
from darkroom.errors import DarkroomError
from darkroom.pixel_format import LIMITS, PixelFormat

RULE = """\
1. Rotate and mirror as the EXIF orientation says.
2. uint8: samples of 16 bits are scaled by 255/65535 and rounded to 8. uint16: samples of 8 bits are multiplied by 257.
   float32: numbers are taken as they are. Palettes are resolved; CMYK, YCbCr, Lab become RGB.
3. channels=1, 3: transparent pictures are composited over the background colour.
4. channels=3: grey is replicated. channels=1: colour becomes luma (ITU-R 601). Otherwise the picture's own number of
   channels must be what is asked for.
5. The largest centred rectangle with the target's aspect ratio is kept.
6. That rectangle is resized to the target with a Lanczos filter, also when it grows, each channel on its own; more
   than 8 bits in float32, where no value leaves the range of the picture's own.
Label maps and masks take steps 1, 5 and 6 with nearest neighbour. Depth maps are pictures of one channel in float32.
Boxes take step 5, are clipped, and are dropped when nothing is left of them.
"""
# Part of every cache key. Raise it when a step above changes.
RULE_VERSION = 1


def to_eight_bits(image: Image.Image, channels: int = 3, background: str = "white") -> Image.Image:
    """Steps 1 to 4 of RULE: mode RGB (channels=3) or L (channels=1)."""
    if channels not in (1, 3):
        raise DarkroomError(f"channels={channels} is not possible here; use 1 or 3")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # I;16 and friends; Pillow reads 16-bit grey PNG as I or I;16
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError("integer samples outside 0..65535")
        image = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point samples; set data.pixels to float32")
    if image.mode in ("LA", "La", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        under = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(under, image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def crop_box(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Step 5 of RULE: (x0, y0, x1, y1) in pixels of a (width, height) picture for a (width, height) target."""
    width, height = image_size
    scale = min(width / size[0], height / size[1])
    w, h = size[0] * scale, size[1] * scale
    return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)


def to_network(image: Image.Image, size: tuple[int, int], channels: int = 3, background: str = "white") -> np.ndarray:
    """The whole RULE: uint8 (C, H, W) for a target of (width, height)."""
    image = to_eight_bits(image, channels, background)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS, box=crop_box(image.size, size))
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def decode(
    data: bytes,
    size: tuple[int, int] | None,
    channels: int = 3,
    pixels: PixelFormat | None = None,
    background: str = "white",
) -> tuple[np.ndarray, tuple[int, int]]:
    """The whole RULE for the content of a file: (C, H, W) in the type of the format, and the (width, height) that the
    upright picture had. Without a size, without steps 5 and 6. Raises ValueError for what cannot be used."""
    pixels = pixels or PixelFormat()
    if pixels.dtype == "uint8" and channels in (1, 3) and not is_array_file(data):
        try:
            with Image.open(io.BytesIO(data)) as picture:
                width, height = picture.size
                turned = picture.getexif().get(0x0112, 1) >= 5
                shape = (height, width) if turned else (width, height)
                return to_network(picture, size or shape, channels, background), shape
        except UnidentifiedImageError:  # a TIFF of many bands
            if data[:2] not in (b"II", b"MM"):
                raise
    values = convert(read_samples(data, channels), channels, pixels, background)
    shape = (values.shape[1], values.shape[0])
    if size is not None and size != shape:
        values = resize(values, size)
    return np.array(values.transpose(2, 0, 1), order="C"), shape  # a copy: arrays of Pillow cannot be written to


def convert(samples: Samples, channels: int, pixels: PixelFormat, background: str = "white") -> np.ndarray:
    """Steps 2 to 4 of RULE at full depth: (H, W, C) in the type of the format."""
    values = _as_type(samples.values, pixels.dtype)
    if samples.alpha and channels in (1, 3):
        top = LIMITS.get(str(samples.values.dtype if pixels.dtype == "float32" else values.dtype), 1)
        values = _composite(values, background, top)
    count = values.shape[2]
    if count == 1 and channels == 3:
        values = np.repeat(values, 3, axis=2)
    elif count == 3 and channels == 1:
        luma = values.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
        values = (luma if pixels.dtype == "float32" else np.rint(luma))[..., None].astype(values.dtype)
    elif count != channels:
        raise ValueError(f"has {count} channels, data.channels is {channels}; make them equal")
    return values


def _as_type(values: np.ndarray, dtype: str) -> np.ndarray:
    """Step 2 of RULE."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("holds values that are not finite (NaN or infinity); replace them by numbers")
    if dtype == "float32":
        return values.astype(np.float32)
    if values.dtype.kind == "f":
        raise ValueError("floating-point samples; set data.pixels to float32")
    if values.dtype not in (np.uint8, np.uint16):
        if int(values.min()) < 0 or int(values.max()) > 65535:
            raise ValueError(
                f"integer samples from {values.min()} to {values.max()}, outside 0..65535; set data.pixels to float32"
            )
        values = values.astype(np.uint16)
    if str(values.dtype) == dtype:
        return values
    if dtype == "uint16":
        return values.astype(np.uint16) * np.uint16(257)
    return ((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)


def _composite(values: np.ndarray, background: str, top: float) -> np.ndarray:
    """Step 3 of RULE: the channels before the last, which is opacity, over the background colour. `top` is what is
    white and opaque: of the file's type where numbers are taken as they are, 1 in floating-point files."""
    opacity = np.clip(values[..., -1:].astype(np.float64) / top, 0, 1)
    colour = np.array(ImageColor.getrgb(background)[:3]) / 255 * top
    if values.shape[2] == 2:
        colour = colour @ np.array([[0.299], [0.587], [0.114]])
    mixed = values[..., :-1] * opacity + colour * (1 - opacity)
    return (mixed if values.dtype == np.float32 else np.rint(mixed)).astype(values.dtype)


def resize(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Steps 5 and 6 of RULE at full depth: (H, W, C) of any type for a target of (width, height)."""
    box = crop_box((values.shape[1], values.shape[0]), size)
    planes = []
    for channel in range(values.shape[2]):
        plane = np.ascontiguousarray(values[..., channel], np.float32)
        resized = np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.LANCZOS, box=box))
        resized = np.clip(resized, plane.min(), plane.max())  # Lanczos rings at edges
        planes.append((resized if values.dtype == np.float32 else np.rint(resized)).astype(values.dtype))
    return np.stack(planes, 2)


NO_LABEL = 255


def labels_to_network(labels: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """RULE for a label map: uint8 (H, W)."""
    if labels.format == "JPEG":
        raise ValueError("label map as JPEG, which changes the class ids at every outline; expected a PNG")
    labels = ImageOps.exif_transpose(labels)
    if labels.mode not in ("L", "P"):
        raise ValueError(f"label map of mode {labels.mode}; expected one 8-bit channel of class ids")
    if labels.mode == "P":  # the ids are the palette positions, not the colours
        labels = Image.fromarray(np.asarray(labels))
    if labels.size != size:
        labels = labels.resize(size, Image.Resampling.NEAREST, box=crop_box(labels.size, size))
    return np.array(labels, np.uint8)


def mask_to_network(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """RULE for a mask: float32 (1, H, W), 1 from half of white upwards."""
    mask = ImageOps.exif_transpose(mask).convert("L")
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.NEAREST, box=crop_box(mask.size, size))
    return (np.asarray(mask) >= 128).astype(np.float32)[None]


def depth_to_network(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """RULE for the content of a depth map: float32 (1, H, W) in the file's own unit."""
    values = convert(read_samples(data, 1), 1, PixelFormat("float32"))
    if (values.shape[1], values.shape[0]) != size:
        values = resize(values, size)
    return np.array(values.transpose(2, 0, 1), order="C")


def read_vector(data: bytes) -> np.ndarray:
    """The content of a .npy file of one axis: float32 (D,)."""
    values = np.load(io.BytesIO(data), allow_pickle=False)
    if values.ndim != 1 or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ValueError(f"a vector of type {values.dtype} and shape {values.shape}; expected finite numbers (D,)")
    return values.astype(np.float32)


def crop_boxes(boxes: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Boxes (n, 5) of class, x0, y0, x1, y1 as seen in the part `box` (normalised x0, y0, x1, y1) of the picture."""
    if not len(boxes):
        return boxes
    x0, y0, x1, y1 = box
    out = boxes.astype(np.float32, copy=True)
    out[:, 1::2] = np.clip((out[:, 1::2] - x0) / (x1 - x0), 0, 1)
    out[:, 2::2] = np.clip((out[:, 2::2] - y0) / (y1 - y0), 0, 1)
    return out[(out[:, 3] > out[:, 1]) & (out[:, 4] > out[:, 2])]


def sizes_of(
    image_size: tuple[int, int], size: tuple[int, int], original: tuple[int, int] | None = None
) -> dict[str, tuple[int, int]]:
    """What steps 5 and 6 of RULE did to a (width, height) picture: `original_size` (height, width), that of the file or
    the one it had before; `crop` (top, left) of what was kept, in pixels of the resized picture; `target_size`
    (height, width). Podell et al. 2023, alg. 1."""
    x0, y0, x1, _ = crop_box(image_size, size)
    scale = size[0] / (x1 - x0)
    width, height = original or image_size
    return {
        "original_size": (height, width),
        "crop": (round(y0 * scale), round(x0 * scale)),
        "target_size": (size[1], size[0]),
    }


def mirrored(image: torch.Tensor) -> torch.Tensor:
    """(..., W) left to right. torch cannot flip 16-bit unsigned integers, but signed ones."""
    if image.dtype == torch.uint16:
        return image.view(torch.int16).flip(-1).view(torch.uint16)
    return image.flip(-1)


# Fields that lie on the image pixel by pixel, or block by block.
PLANES = ("image", "segmentation", "low_resolution", "repaint_mask", "depth")


def crop_step(example: dict[str, Any], width: int, height: int) -> int:
    """Corners of crops of (width, height) must be multiples of this, so that all fields can be cut alike."""
    if "low_resolution" not in example:
        return 1
    factor = round(example["image"].shape[-1] / example["low_resolution"].shape[-1])
    if width % factor or height % factor:
        raise DarkroomError(
            f"random_crop {width}x{height} does not fit data.low_resolution.factor {factor}; give multiples of it"
        )
    return factor


def flip_example(example: dict[str, Any]) -> dict[str, Any]:
    """The example mirrored left to right: image, maps and boxes. Its text stays, and so do its `sizes`: what was cut
    off is the same on both sides."""
    out = dict(example)
    for field in PLANES:
        if field in out:
            out[field] = mirrored(out[field])
    if "boxes" in out:
        boxes = out["boxes"].clone()
        boxes[:, 1], boxes[:, 3] = 1 - out["boxes"][:, 3], 1 - out["boxes"][:, 1]
        out["boxes"] = boxes
    return out


def crop_example(example: dict[str, Any], x: int, y: int, width: int, height: int) -> dict[str, Any]:
    """The rectangle with the top left pixel (x, y): image, maps, boxes, sizes. Its text and class stay. A smaller
    picture (`low_resolution`) needs x, y, width and height that are multiples of its factor: see `crop_step`."""
    out = dict(example)
    full_height, full_width = example["image"].shape[-2:]
    for field in PLANES:
        if field in out:
            factor = round(full_width / out[field].shape[-1])
            left, top, right, bottom = (v // factor for v in (x, y, x + width, y + height))
            out[field] = out[field][..., top:bottom, left:right]
    if "sizes" in out:
        top, left = out["sizes"]["crop"]
        out["sizes"] = out["sizes"] | {"crop": (top + y, left + x), "target_size": (height, width)}
    if "boxes" in out:
        part = (x / full_width, y / full_height, (x + width) / full_width, (y + height) / full_height)
        out["boxes"] = torch.from_numpy(crop_boxes(out["boxes"].numpy(), part))
    return out
