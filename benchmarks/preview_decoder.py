"""How much faster a preview decoder is than its first stage's own decoder, and what it costs in dB.

    python benchmarks/preview_decoder.py MODEL [--data FOLDER|TAR] [--size 64] [--batch 1] [--rounds 30] [--count 128]

Both decode the same latents of the same images in turn, so that a busy machine slows both alike; PSNR is against the
images, mean over them. The exit status is 1 when the preview decoder is less than ten times as fast or too large.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from darkroom.data.batches import ordered_batches
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.model_io import load_first_stage
from darkroom.preview_job import compare, time_decoders

FASTER, PARAMETERS, BYTES = 10.0, 1_000_000, 2_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="shapes", help="images to score with (default: shapes)")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="images per decode when the time is taken")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--count", type=int, default=128, help="images to score")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    first_stage = load_first_stage(options.model, "cpu")
    if first_stage.preview is None:
        print(f"{options.model} has no preview decoder: darkroom train preview --first-stage {options.model}")
        return 2
    config = DataConfig(source=options.data, size=options.size, channels=first_stage.image_channels, validation=0.0)
    batches = list(ordered_batches(open_dataset(config), 32, options.count))
    found = compare(first_stage, batches)
    latent = first_stage.encode(batches[0]["image"][: options.batch]).mode()
    seconds = time_decoders(first_stage, latent, options.rounds)
    ratio = seconds["full"] / seconds["preview"]
    size = 2 * found["parameters"]
    print(f"preview decoder   {found['parameters']:,.0f} parameters, {size / 1e6:.2f} MB in float16")
    print(f"full decoder      {1000 * seconds['full']:8.2f} ms   PSNR {found['psnr_full_decoder']:.2f} dB")
    print(f"preview decoder   {1000 * seconds['preview']:8.2f} ms   PSNR {found['psnr']:.2f} dB")
    print(f"ratio {ratio:.1f}x, {found['decibels_lost']:.2f} dB lost, {options.batch} x {options.size}x{options.size}")
    return 0 if ratio >= FASTER and found["parameters"] <= PARAMETERS and size <= BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
