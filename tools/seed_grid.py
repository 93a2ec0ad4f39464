"""Held-out photos through a model of super-resolution or inpainting with the seeds 0 to 7, none chosen by eye.

    python tools/seed_grid.py MODEL PHOTOS.tar --size 128 -o docs/images/upscaling-seeds.png [--count 6] [--consistency]

The photos stand at equal distances in the set (number i * all // count). A row is what the model is given (the small
picture, or the photo with its hole in grey), what it makes of it with each seed, and the photo.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import darkroom
from darkroom.data.degradations import LowResolution
from darkroom.data.io import image_grid, write_image
from darkroom.data.masks import RandomMask
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.editing import Editor, EditSettings
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.upscaling import Upscaler, UpscaleSettings

SEEDS = range(8)


def array(image: torch.Tensor) -> np.ndarray:
    """(C, H, W) -> (H, W, C)."""
    return image.permute(1, 2, 0).contiguous().numpy()


def enlarged(model: LatentDiffusion, example: dict[str, Any], consistency: bool) -> list[np.ndarray]:
    small, upscaler = array(example["low_resolution"]), Upscaler(model)
    made = [upscaler(small, UpscaleSettings(seed=seed, consistency=consistency)).image for seed in SEEDS]
    return [small.repeat(upscaler.factor, 0).repeat(upscaler.factor, 1), *made]


def repainted(model: LatentDiffusion, example: dict[str, Any]) -> list[np.ndarray]:
    photo, hole = array(example["image"]), example["repaint_mask"][0].numpy() >= 0.5
    made = Editor(model)(photo, hole, EditSettings(seeds=tuple(SEEDS)))
    return [np.where(hole[..., None], np.uint8(127), photo), *made.images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--share", type=float, nargs=2, default=(0.2, 0.5), help="of the photo that holes take")
    parser.add_argument("--consistency", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    model = darkroom.load(options.model, device="cpu")
    assert isinstance(model, LatentDiffusion)
    repaints = "repaint_mask" in model.conditioner.fields
    rule: dict[str, Any] = (
        {"repaint_mask": RandomMask(tuple(options.share))} if repaints else {"low_resolution": LowResolution(4)}
    )
    data = open_dataset(DataConfig(source=options.photos, size=options.size, validation=0.0, **rule), "train")
    cells: list[np.ndarray] = []
    for number in range(options.count):
        example = data[number * len(data) // options.count]
        made = repainted(model, example) if repaints else enlarged(model, example, options.consistency)
        cells += [*made, array(example["image"])]
    write_image(image_grid(cells, columns=len(SEEDS) + 2), options.output)


if __name__ == "__main__":
    main()
