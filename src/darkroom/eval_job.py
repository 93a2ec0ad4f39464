"""`darkroom eval --first-stage`: a model and images in, scores, pictures and a page out.

load the first stage -> open the images at its pixel format -> score
-> scores.json, pictures.png, flat-colours.png, report.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from darkroom.data.io import image_grid, write_image
from darkroom.data.locations import is_shapes, part_of
from darkroom.data.records import read_parts
from darkroom.data.sources import SYNTHETIC, DataConfig, ImageDataset, open_dataset
from darkroom.errors import DarkroomError
from darkroom.eval_places import model_name, trained_size
from darkroom.evaluation.environment import hardware
from darkroom.evaluation.first_stage import FirstStageScores, evaluate_first_stage
from darkroom.first_stage.artefacts import FlatColourResult, flat_colour_test
from darkroom.first_stage.first_stage import FirstStage
from darkroom.model_folder import is_model_folder
from darkroom.model_io import load_first_stage, select_device
from darkroom.pixel_format import PixelFormat
from darkroom.report_evaluation import evaluation_page
from darkroom.safe_files import write_file

DEFAULT_SIZE = 256  # the paper's, where a model does not say what it was trained on
SHOWN = 16
FULL_ERROR = 0.25  # of the range: white in the error maps


@dataclass(frozen=True)
class Evaluation:
    """Where the files are, and the scores."""

    folder: Path
    scores: FirstStageScores


def evaluate(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    count: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score the first stage of a model on images; what was found is written into the folder `output`.

    model: a Darkroom model or run folder, a bundled name, or an official first-stage file.
    data: folders, tars, globs or `shapes`; each gets scores of its own. Of one with a validation part only that counts.
    output: by default `runs/eval-NAME OF THE MODEL`.
    size: (width, height) or the side of a square; by default that of the model's training images, else 256.
    count: at most so many images of each source.

    Raises DarkroomError for anything a user can mend.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    name = model_name(model)
    folder = Path("runs") / f"eval-{name}" if output is None else Path(output)
    _check_folder(folder)
    first_stage = load_first_stage(str(model), select_device(device))
    sides = size or trained_size(model) or DEFAULT_SIZE
    places = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    sets = open_images([str(place) for place in places], sides, first_stage)
    scores = evaluate_first_stage(
        first_stage,
        sets,
        batch_size=batch_size,
        count=count,
        shown=SHOWN,
        facts={"model": name, "hardware": hardware(first_stage.device)},
        report=progress,
    )
    write_evaluation(folder, scores, name, flat_colour_test(first_stage))
    return Evaluation(folder, scores)


def open_images(places: Sequence[str], size: int | tuple[int, int], first_stage: FirstStage) -> dict[str, ImageDataset]:
    """The images of each place by its name, in the number format that the first stage works on."""
    if not places:
        raise DarkroomError("nothing to evaluate on: give a folder of images, a tar, or shapes")
    sets: dict[str, ImageDataset] = {}
    for place in places:
        images = _open(place, size, first_stage.image_channels, first_stage.pixels)
        name = unique = Path(part_of(place)[0]).name.split(".")[0].rstrip("*-_") or "images"
        number = 1
        while unique in sets:
            number += 1
            unique = f"{name} {number}"
        sets[unique] = images
    return sets


def _open(place: str, size: int | tuple[int, int], channels: int, pixels: PixelFormat) -> ImageDataset:
    path, count = part_of(place)
    drawn = is_shapes(place) or path in SYNTHETIC
    options: dict[str, Any] = {"size": size, "channels": channels, "pixels": pixels.dtype}
    if pixels.dtype == "float32" or pixels != PixelFormat.of(pixels.dtype):
        options["value_range"] = (pixels.low, pixels.high)
    if drawn:  # procedural sets have held-out images of their own
        return open_dataset(DataConfig(source=path, limit=count, **options), "validation")
    divided = read_parts(path)[1] is not None
    config = DataConfig(source=path, validation=0.0, limit=count, **options)
    return open_dataset(config, "validation" if divided else "train")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DarkroomError(f"{folder}: is a file; choose a folder for --output")
    if (folder / "config.yaml").exists() or is_model_folder(folder):
        raise DarkroomError(f"{folder}: holds a run or a model; choose another --output for the scores")


# --- files -----------------------------------------------------------------------------------------------------------


def write_evaluation(folder: Path, scores: FirstStageScores, name: str, flat: FlatColourResult) -> None:
    """pictures.png, flat-colours.png, report.html and last scores.json, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    record = scores.record | {"flat_colours": flat.as_dict()}
    write_image(comparison(scores.images, scores.reconstructions), folder / "pictures.png")
    write_image(image_grid(displayed(flat.picture), columns=len(flat.picture)), folder / "flat-colours.png")
    write_file(folder / "report.html", evaluation_page(record, folder, name).encode())
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_file(folder / "scores.json", text.encode())


def comparison(images: Tensor, reconstructions: Tensor, columns: int = 8) -> Image.Image:
    """A picture: blocks of three rows, (n, C, H, W) images, their reconstructions, and the errors."""
    columns = min(columns, len(images))
    blank = np.full((*images.shape[-2:], 3), 255, np.uint8)
    tiles: list[np.ndarray] = []
    for start in range(0, len(images), columns):
        one, two = images[start : start + columns], reconstructions[start : start + columns]
        for row in (displayed(one), displayed(two), error_maps(one, two)):
            tiles += [*row, *([blank] * (columns - len(one)))]
    return image_grid(tiles, columns)


def displayed(images: Tensor) -> np.ndarray:
    """(n, C, H, W) in [-1, 1] -> (n, H, W, 3) uint8; other numbers of channels than 3 as the grey of their mean."""
    shown = images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    pixels = ((shown.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def error_maps(images: Tensor, reconstructions: Tensor) -> np.ndarray:
    """(n, C, H, W) twice -> (n, H, W, 3) uint8: mean absolute error of the channels, from black over red and yellow to
    white at FULL_ERROR of the range."""
    error = (images.float() - reconstructions.float()).abs().mean(1) / (2 * FULL_ERROR)
    heat = torch.stack([3 * error, 3 * error - 1, 3 * error - 2], -1).clamp(0, 1)
    return (heat * 255).round().to(torch.uint8).cpu().numpy()
