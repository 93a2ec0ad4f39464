"""How well distances see distortions: ours against PSNR, SSIM and the Laplacian pyramid, on all held-out pictures.

    python benchmarks/perceptual_validation.py --data DIR [--network FOLDER] [--count 184]

DIR holds emoji-128 and clothing-128 with their validation shards. LPIPS joins the table where its files are present.
First table: mean (and worst) rank correlation of strength and distance per kind of distortion. Second: the share of
pictures for which the picture moved by one pixel is nearer than the blurred one. With --speed: milliseconds of each
distance as a loss, forward and backward. The exit status is 1 when ours does not reach 0.95 or does not beat both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from darkroom.data.sources import DataConfig, open_dataset
from darkroom.evaluation.distortion_ranking import (
    DEVIATIONS,
    STRENGTHS,
    Distance,
    distances_by_strength,
    shift_before_blur,
    spearman,
)
from darkroom.evaluation.metrics import psnr, ssim
from darkroom.features.laplacian import NormalisedLaplacianDistance
from darkroom.features.lpips import load_lpips, lpips_available
from darkroom.features.perceptual import load_perceptual

ASKED = ("blur", "noise", "jpeg", "shift", "colour", "block")
LOT = 32


def held_out(data: str, name: str, count: int) -> Tensor:
    """(count, 3, 128, 128), evenly over the validation split."""
    dataset = open_dataset(DataConfig(source=f"{data}/{name}", size=128), "validation")
    count = min(count, len(dataset))
    return torch.stack([dataset[i * len(dataset) // count]["image"] for i in range(count)]).float() / 127.5 - 1


def in_lots(distance: Distance) -> Distance:
    def run(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([distance(x, y).double() for x, y in zip(a.split(LOT), b.split(LOT), strict=True)])

    return run


def milliseconds(distance: Callable[[Tensor, Tensor], Tensor], size: int, rounds: int = 7) -> float:
    """Per image of size x size as a loss: forward, and backward to the second image."""
    a, b = torch.rand(16, 3, size, size) * 2 - 1, (torch.rand(16, 3, size, size) * 2 - 1).requires_grad_()
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        torch.autograd.grad(distance(a, b).sum(), b)
        best = min(best, time.process_time() - start)
    return 1000 * best / 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--network", help="a folder with a trained network [default: the bundled one]")
    parser.add_argument("--count", type=int, default=184, help="pictures of each set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = load_perceptual(args.network)
    losses: dict[str, Distance] = {"laplacian": NormalisedLaplacianDistance(), "ours": network}
    if lpips_available():
        losses["LPIPS"] = load_lpips()
    distances: dict[str, Distance] = {"PSNR": lambda a, b: -psnr(a, b), "SSIM": lambda a, b: 1 - ssim(a, b), **losses}
    print(f"network {network.sha256[:16]}")
    good = True
    for name in ("emoji-128", "clothing-128"):
        wide = held_out(args.data, name, args.count)
        print(f"\n{name}: {len(wide)} held-out pictures\n{'rank correlation':20}", *(f"{n:>15}" for n in distances))
        for kind in STRENGTHS:
            row = {n: spearman(distances_by_strength(in_lots(d), wide, kind)) for n, d in distances.items()}
            print(f"{kind:20}", *(f"{float(r.mean()):7.3f} ({float(r.min()):5.2f})" for r in row.values()), flush=True)
            good &= kind not in ASKED or float(row["ours"].mean()) >= 0.95
        print(f"{'shift before blur':20}")
        for deviation in DEVIATIONS:
            shares = {
                n: float(shift_before_blur(in_lots(d), wide, deviation).float().mean()) for n, d in distances.items()
            }
            print(f"{f'{deviation} pixels':20}", *(f"{v:15.3f}" for v in shares.values()), flush=True)
            good &= shares["ours"] >= max(shares["PSNR"], shares["SSIM"])
    if args.speed:
        print("\nmilliseconds per image as a loss, forward and backward (processor time)")
        for size in (64, 128):
            print(f"{size}x{size}", *(f"{n} {milliseconds(d, size):.2f}" for n, d in losses.items()))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                print(f"{size}x{size} bfloat16 autocast", f"ours {milliseconds(network, size):.2f}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
