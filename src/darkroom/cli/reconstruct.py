"""`darkroom reconstruct`: an image through a first stage and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from darkroom.errors import DarkroomError

if TYPE_CHECKING:
    import numpy as np

    from darkroom.first_stage.first_stage import FirstStage


@click.command(short_help="An image through a first stage and back.")
@click.argument("model")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: IMAGE-reconstructed, same type]")
@click.option("--convert", is_flag=True, help="Bring the image to the model's channels and depth.")
@click.option("--tile", default="auto", show_default=True, help="auto, none, or a side in pixels: bounds the memory.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
def reconstruct(
    model: str, image: Path, output: Path | None, convert: bool, tile: str, device: str, threads: int | None
) -> None:
    """Encode IMAGE, decode it again, and write what comes back: what the first stage of MODEL keeps of it.

    The result has the size, the channels and the type of the image: a 16-bit grey image comes back as one. Any size.

    \b
      darkroom reconstruct runs/grey16 scan.png -o again.png
      darkroom reconstruct emoji photo.jpg --convert
    """
    if tile not in ("auto", "none") and not (tile.isdigit() and int(tile)):
        raise DarkroomError(f"--tile {tile}: give auto, none, or a number of pixels")
    from darkroom.data.image_files import OUTPUT_SUFFIXES, check_suffix, save_image
    from darkroom.reconstruction import psnr
    from darkroom.reconstruction import reconstruct as through

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from darkroom.model_io import load_first_stage

    first_stage = load_first_stage(model, device)
    values = _read(image, first_stage, convert)
    if output is None:
        known = image.suffix.lower() in OUTPUT_SUFFIXES
        output = image.with_name(f"{image.stem}-reconstructed{image.suffix if known else '.png'}")
    check_suffix(output, values.shape[2], str(values.dtype))
    if output.absolute() == image.absolute():
        raise DarkroomError(f"{output}: that is the image itself; choose another output")
    pixels = first_stage.pixels
    back = through(first_stage, values, {"auto": "auto", "none": None}.get(tile, int(tile) if tile.isdigit() else None))
    save_image(output, back)
    outside = float(((values < pixels.low) | (values > pixels.high)).mean())
    if outside:
        click.echo(
            f"note: {outside:.1%} of the values lie outside the model's {pixels.low:g} to {pixels.high:g} "
            "and were clipped",
            err=True,
        )
    error = abs(values.astype("float64") - back.astype("float64")).mean()
    click.echo(click.format_filename(output))
    click.echo(
        f"{values.shape[1]}x{values.shape[0]}, {pixels}: mean absolute error {error:.4g}, "
        f"PSNR {psnr(values, back, pixels.high - pixels.low):.2f} dB"
    )


def _read(path: Path, first_stage: FirstStage, convert: bool) -> np.ndarray:
    """(H, W, C) as the first stage takes it."""
    from darkroom.data.image_files import read_samples
    from darkroom.data.io import read_image
    from darkroom.reconstruction import sample_kind

    pixels, channels = first_stage.pixels, first_stage.image_channels
    try:
        samples = read_samples(path.read_bytes(), channels)
    except (OSError, ValueError, SyntaxError):
        return read_image(path, None, channels, pixels=pixels)  # says what is wrong
    count, dtype = samples.values.shape[2], str(samples.values.dtype)
    if dtype == "int32" and samples.values.min() >= 0 and samples.values.max() <= 65535:
        dtype = "uint16"  # what older versions of Pillow make of 16-bit grey
    floats = dtype.startswith("float") and pixels.dtype != "float32"  # whose range nobody knows
    if floats or (not convert and (count, dtype) != (channels, pixels.dtype)):
        cure = f"save it as {pixels.dtype}" if floats else "--convert brings it there"
        has, takes = sample_kind(count, dtype), sample_kind(channels, pixels.dtype)
        raise DarkroomError(f"{path} has {has}, the model takes {takes}; {cure}")
    return read_image(path, None, channels, pixels=pixels)
