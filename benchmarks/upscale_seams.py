"""`darkroom upscale` of a large photo: peak memory, time, and whether the borders of its windows can be seen.

    python benchmarks/upscale_seams.py [--model clothing-sr] [--photo PHOTO] [--size 1024x768] [--threads 1]
                                       [--consistency] [--window PIXELS] [--overlap PIXELS] [--check]

The command runs in a process of its own, whose memory is all of it: Python, torch, weights, result. Without --photo one
is drawn: noise of the spectrum of photos, with edges. Seam energy is the mean absolute difference between the two
pixels on either side of a window's border, against that of pixels 16, 32 and 48 away: at the same place of the
decoder's own grid, and near, so that what the photo shows there is the same. 1 is no seam.
With --check the exit status is 1 above 4 GB or a seam energy of 1.05.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from darkroom.errors import DarkroomError
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load
from darkroom.upscaling import Upscaler, UpscaleSettings
from darkroom.upscaling.windows import make_windows

LARGEST_MEMORY_GB, LARGEST_SEAM = 4.0, 1.05
STEPS_AWAY = (1, 2, 3)  # of the grid, on both sides of a border


def drawn_photo(width: int, height: int) -> Image.Image:
    """Colours with a 1/f spectrum, and discs with sharp edges."""
    rng = np.random.default_rng(0)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    fall = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height))
    planes = []
    for _ in range(3):
        field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * fall, s=(height, width))
        planes.append(0.5 + 0.2 * field / field.std())
    image = np.stack(planes, 2)
    y, x = np.mgrid[:height, :width]
    for _ in range(60):
        cx, cy, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.01, 0.08) * width
        inside = (x - cx) ** 2 + (y - cy) ** 2 < r**2
        image[inside] = 0.6 * image[inside] + 0.4 * rng.random(3)
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))


def borders_of(upscaler: Upscaler, width: int, height: int, settings: UpscaleSettings) -> tuple[list[int], list[int]]:
    """(columns, rows) of the result at which a window begins or ends."""
    canvas = upscaler.canvas(width, height)
    side, overlap = upscaler.window(settings)
    f, multiple = upscaler.model.downsampling, upscaler.model.denoiser.network.config.size_multiple
    windows = make_windows(canvas.latent[1], canvas.latent[0], side, overlap, multiple)
    found = []
    for ends, length in (([w.columns for w in windows], width), ([w.rows for w in windows], height)):
        places = {place * f for pair in ends for place in pair}
        found.append(sorted(place for place in places if 0 < place < length * upscaler.factor))
    return found[0], found[1]


def seam_energy(image: np.ndarray, borders: list[int], grid: int) -> tuple[float, float]:
    """(H, W, C): mean difference across these columns, and across columns some steps of the grid away."""
    energy = np.abs(np.diff(image.astype(np.float32), axis=1)).mean((0, 2))  # at j: between columns j and j + 1
    across, near = [], []
    for border in borders:
        around = [border + sign * k * grid for k in STEPS_AWAY for sign in (-1, 1)]
        around = [place for place in around if place not in borders and 0 < place < image.shape[1]]
        if around:
            across.append(energy[border - 1])
            near.append(np.mean([energy[place - 1] for place in around]))
    if not across:
        return math.nan, math.nan
    return float(np.mean(across)), float(np.mean(near))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="clothing-sr")
    parser.add_argument("--photo", type=Path)
    parser.add_argument("--size", default="1024x768")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--overlap", type=int)
    parser.add_argument("--consistency", action="store_true")
    parser.add_argument("--output", type=Path, help="keep the result here")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    try:
        model = load(options.model, device="cpu")
    except DarkroomError as error:
        print(f"left out: {error}")
        return int(options.check)
    assert isinstance(model, LatentDiffusion)
    settings = UpscaleSettings(window=options.window, overlap=options.overlap)
    width, height = map(int, options.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        photo = options.photo or Path(folder) / "photo.png"
        if options.photo is None:
            drawn_photo(width, height).save(photo)
        with Image.open(photo) as picture:
            width, height = picture.size
        output = options.output or Path(folder) / "large.png"
        command = [sys.executable, "-m", "darkroom", "upscale", str(photo), "-m", options.model, "-o", str(output)]
        command += ["--overwrite", "--threads", str(options.threads), "--device", "cpu"]
        for name in ("steps", "window", "overlap"):
            if (value := getattr(options, name)) is not None:
                command += [f"--{name}", str(value)]
        command += ["--consistency"] if options.consistency else []
        started = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        with Image.open(output) as picture:
            image = np.asarray(picture)
    upscaler = Upscaler(model)
    grid = model.downsampling * model.size_multiple
    columns, rows = borders_of(upscaler, width, height, settings)
    sides = [seam_energy(image, columns, grid), seam_energy(image.transpose(1, 0, 2), rows, grid)]
    names = ("columns", "rows")
    peak = used.ru_maxrss / 1e6
    print(
        f"{width}x{height} -> {image.shape[1]}x{image.shape[0]}, {model.info.get('name')}, {options.threads} thread(s)"
    )
    print(
        f"peak memory {peak:.2f} GB, {seconds:.0f} s of the clock, {used.ru_utime + used.ru_stime:.0f} s of processors"
    )
    for name, (across, near), count in zip(names, sides, (len(columns), len(rows)), strict=True):
        print(f"seam energy, {count} {name}: {across / near:.4f} ({across:.3f} against {near:.3f} levels)")
    both = sum(a for a, _ in sides) / sum(n for _, n in sides)
    print(f"seam energy: {both:.4f}")
    return int(options.check and not (peak <= LARGEST_MEMORY_GB and both <= LARGEST_SEAM))  # nan is no pass


if __name__ == "__main__":
    sys.exit(main())
