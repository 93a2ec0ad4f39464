"""Pictures at the edges: reading one for an edit, writing PNGs whole or not at all, grids and contact sheets.

Grids and sheets are for looking at, so they have 8 bits: other images are shown as `preview` says.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from darkroom.data.image_files import png_info
from darkroom.data.transforms import decode
from darkroom.errors import DarkroomError
from darkroom.pixel_format import PixelFormat
from darkroom.safe_files import write_file


def read_image(
    path: str | Path,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    background: str = "white",
    pixels: PixelFormat | None = None,
) -> np.ndarray:
    """A picture by the rule of `transforms`, (H, W, C) in the type of `pixels` (8 bits by default); without a size
    (width, height) without steps 5, 6."""
    path = Path(path).expanduser()
    with explaining(path):
        values, _ = decode(path.read_bytes(), size, channels, pixels, background)
    return np.ascontiguousarray(values.transpose(1, 2, 0))


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Around reading a picture that someone named: whatever fails becomes one line with the cure."""
    if path.is_dir():
        raise DarkroomError(f"{path} is a folder; name a picture file")
    if not path.exists():
        raise DarkroomError(f"{path}: no such file; check the path of the picture")
    try:
        yield
    except DarkroomError:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "unknown format" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise DarkroomError(
            f"{path} is not a picture that can be read ({reason}); use a PNG, JPEG, WebP, TIFF, NPY or EXR file"
        ) from None


def preview(image: np.ndarray, pixels: PixelFormat | None = None) -> np.ndarray:
    """An image of any kind for people: (H, W) or (H, W, C) -> uint8 (H, W, 1 or 3).

    The value range becomes 0 to 255. Of two channels the first is shown, of four and more the first three.
    """
    pixels = pixels or PixelFormat()
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    values = values[..., :1] if values.shape[2] < 3 else values[..., :3]
    if pixels == PixelFormat():
        return values
    network = pixels.to_network(torch.from_numpy(np.ascontiguousarray(values)))
    return PixelFormat().from_network(network).numpy()


def to_picture(image: Image.Image | np.ndarray) -> Image.Image:
    """uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as a Pillow image."""
    if isinstance(image, Image.Image):
        return image
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"a picture is uint8 (H, W, C), got {pixels.dtype} {pixels.shape}")
    return Image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    )


def png_bytes(image: Image.Image | np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """PNG file content with text chunks (international text, so any Unicode)."""
    buffer = io.BytesIO()
    to_picture(image).save(buffer, "PNG", pnginfo=png_info(text))
    return buffer.getvalue()


def write_png(path: str | Path, image: Image.Image | np.ndarray, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically: under a temporary name, flushed, renamed. On failure nothing is left behind."""
    write_file(Path(path), png_bytes(image, text))


def write_image(image: Image.Image | np.ndarray, path: str | Path) -> None:
    """`write_png` without text."""
    write_png(path, image)


def image_grid(
    images: np.ndarray | Sequence[np.ndarray | Image.Image],
    columns: int | None = None,
    padding: int = 2,
    pixels: PixelFormat | None = None,
) -> Image.Image:
    """Pictures in rows, each in a cell of the largest size; (B, H, W, C) or a sequence. By default a square.

    pixels: of arrays that do not have 8 bits; see `preview`.
    """
    pictures = [image if isinstance(image, Image.Image) else to_picture(preview(image, pixels)) for image in images]
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = math.ceil(len(pictures) / columns)
    mode = "L" if all(p.mode == "L" for p in pictures) else "RGB"
    size = (columns * (width + padding) - padding, rows * (height + padding) - padding)
    grid = Image.new(mode, size, "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        grid.paste(picture.convert(mode), (column * (width + padding), row * (height + padding)))
    return grid


def contact_sheet(
    images: Sequence[Any],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    class_names: Sequence[str] = (),
    pixels: PixelFormat | None = None,
) -> Image.Image:
    """What the network sees, with what it is told.

    images: examples of a dataset, or pictures (uint8 (H, W, C) arrays or Pillow images) with their captions. Examples
        show their text, else their class (by name when `class_names` has one), and their boxes as outlines.
    pixels: of examples that do not have 8 bits; see `preview`.
    """
    if not len(images):
        raise ValueError("a contact sheet needs at least one picture")
    shown: list[Image.Image] = []
    words: list[str] = []
    for place, item in enumerate(images):
        words.append(_plain(captions[place] if captions is not None else _words(item, class_names)))
        shown.append(_example_picture(item, pixels) if isinstance(item, dict) else to_picture(item).convert("RGB"))
    # Small pictures are shown enlarged by whole factors, so that pixels stay pixels.
    cell = max(p.width for p in shown)
    factor = max(1, 128 // cell)
    shown = [p.resize((p.width * factor, p.height * factor), Image.Resampling.NEAREST) for p in shown]
    for picture, item in zip(shown, images, strict=True):
        if isinstance(item, dict):
            _outline(picture, item.get("boxes", ()))
    cell = max(p.width for p in shown)
    font = ImageFont.load_default(11)
    lines = [textwrap.wrap(w, max(8, cell * 10 // 58))[:4] for w in words]
    strip = 14 * max((len(x) for x in lines), default=0)
    cells = []
    for picture, text in zip(shown, lines, strict=True):
        tile = Image.new("RGB", (cell, max(p.height for p in shown) + strip), "white")
        tile.paste(picture)
        ImageDraw.Draw(tile).multiline_text((1, picture.height + 1), "\n".join(text), "black", font, spacing=1)
        cells.append(tile)
    return image_grid(cells, min(columns, len(cells)), padding=6)


def _plain(text: str) -> str:
    """Without accents: the font inside Pillow draws boxes for most accented letters."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _words(item: Any, class_names: Sequence[str]) -> str:
    if not isinstance(item, dict):
        return ""
    if "text" in item:
        return str(item["text"])
    if "class_label" not in item:
        return ""
    number = int(item["class_label"])
    return class_names[number] if number < len(class_names) else f"class {number}"


def _example_picture(example: dict[str, Any], pixels: PixelFormat | None) -> Image.Image:
    return to_picture(preview(example["image"].permute(1, 2, 0).numpy(), pixels)).convert("RGB")


def _outline(picture: Image.Image, boxes: Any) -> None:
    """Draws (class, x0, y0, x1, y1), of the picture's sides, as lines whose outer edge is the box: after a picture is
    enlarged, because its own pixels may be coarser than the boxes."""
    draw = ImageDraw.Draw(picture)
    for _, x0, y0, x1, y1 in boxes.tolist() if len(boxes) else ():
        left = min(round(x0 * picture.width), picture.width - 1)
        top = min(round(y0 * picture.height), picture.height - 1)
        right, bottom = round(x1 * picture.width) - 1, round(y1 * picture.height) - 1
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=(255, 0, 255))
