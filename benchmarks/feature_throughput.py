"""Looking at pictures for scores: our loop against that of the reference library, on the same network and weights.

    python benchmarks/feature_throughput.py [--rounds 5] [--images 32] [--batch 8] [--size 256] [--threads 1]
                                            [--device cpu] [--row TEXT] [--cpu-time]

A run takes pictures, uint8, and ends with the features of all of them on the CPU; weights are random, in the published
layouts. Rows: FID's Inception by the TensorFlow protocol (torch-fidelity's extractor), by that of clean-fid (its resize
of each picture, then torch-fidelity's network, which is the same), and DINOv2 S/14 with registers (Pillow's resize and
transformers' network; the one without registers differs there, see docs/scores.md).

Both sides run in one process in turning order, so that a busy machine slows both alike; the ratio of a round is their
time over ours, and above 1 we are faster. Before a row is timed both sides must agree on its features.

On a machine that is busy with other work, --threads 1 --cpu-time counts the seconds in which this process really ran.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from unet_vs_diffusers import add_common_arguments, begin, clock, quantile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import reference_metrics as reference
from feature_weights import dinov2_as_published, randomise

from darkroom.evaluation.extractors import Extractor, open_extractor
from darkroom.features import inception

TOLERANCE = 1e-4  # relative, of all features together
RESIZE = "interpolate_bilinear_2d_like_tensorflow1x"

Run = Callable[[], Tensor]
Look = Callable[[Tensor], Tensor]  # uint8 (B, H, W, 3) -> features (B, D)


@dataclass(frozen=True)
class Row:
    name: str
    ours: Look
    theirs: Look


def over(images: Tensor, batch: int, look: Look) -> Tensor:
    """The loop: batch by batch, features kept on the CPU."""
    return torch.cat([look(part).cpu() for part in images.split(batch)])


def embedding(extractor: Extractor) -> Look:
    return lambda images: extractor(images).embedding


def inception_rows(folder: Path, device: torch.device) -> list[Row]:
    file = folder / inception.FILES[0]
    torch.save(dict(randomise(inception.Inception()).state_dict()), file)
    wanted = ["2048", "logits_unbiased"]
    network = reference.fidelity_inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", wanted, feature_extractor_weights_path=str(file)
    ).to(device)
    resize = reference.clean_resize.build_resizer("clean")

    @torch.no_grad()
    def tensorflow(images: Tensor) -> Tensor:
        return network(images.permute(0, 3, 1, 2).to(device))[0]

    @torch.no_grad()
    def clean(images: Tensor) -> Tensor:
        resized = torch.from_numpy(np.stack([resize(picture) for picture in images.numpy()]))
        pixels = resized.permute(0, 3, 1, 2).to(device)
        # torch-fidelity's network takes bytes and resizes them itself: in that place it is given these pictures.
        with patch.object(reference.fidelity_inception, RESIZE, lambda *_, **__: pixels):
            return network(torch.zeros(len(images), 3, 1, 1, dtype=torch.uint8, device=device))[0]

    return [
        Row("Inception, TensorFlow's resize", embedding(open_extractor("inception-tf", device)), tensorflow),
        Row("Inception, clean-fid's resize", embedding(open_extractor("inception-clean", device)), clean),
    ]


def dinov2_row(folder: Path, device: torch.device) -> Row:
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    network = randomise(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes))).eval()
    torch.save(dinov2_as_published(network.state_dict()), folder / "dinov2_vits14_reg4_pretrain.pth")
    ours = open_extractor("dinov2-vits14-reg4", device)
    network.to(device)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    @torch.no_grad()
    def theirs(images: Tensor) -> Tensor:
        resized = [Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC) for p in images.numpy()]
        pixels = (torch.from_numpy(np.stack(resized)) / 255 - mean) / std
        return network(pixels.permute(0, 3, 1, 2).to(device)).last_hidden_state[:, 0]

    return Row("DINOv2 S/14, Pillow's resize", embedding(ours), theirs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each row (default: 5)")
    parser.add_argument("--images", type=int, default=32, help="pictures of a run (default: 32)")
    parser.add_argument("--batch", type=int, default=8, help="pictures looked at together (default: 8)")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures (default: 256)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    add_common_arguments(parser)
    args = parser.parse_args(arguments)
    now = begin(parser, args)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.images, args.size, args.size, 3), generator=draw).byte()
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ, {"DARKROOM_WEIGHTS": name}):
        folder = Path(name)
        rows = [*inception_rows(folder, args.device), dinov2_row(folder, args.device)]
    print(f"{'images per second':40} {'ours':>7} {'theirs':>7}  {'ratio':>5}  {'10-90 %':^11}  difference")
    for row in rows:
        if args.row in row.name:
            print(measured(row, images, args.batch, args.rounds, now), flush=True)
    return 0


def measured(row: Row, images: Tensor, batch: int, rounds: int, now: Callable[[], float]) -> str:
    """A line of the table."""
    sides = {"ours": partial(over, images, batch, row.ours), "theirs": partial(over, images, batch, row.theirs)}
    one, other = (side() for side in sides.values())  # also warms up
    difference = float((one - other).norm() / other.norm())
    if not difference <= TOLERANCE:
        raise SystemExit(f"{row.name}: the sides differ by {difference:.2g}, more than {TOLERANCE:.0e}")
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            seconds[side].append(clock(sides[side], now))
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    ours, theirs = (len(images) / statistics.median(seconds[side]) for side in ("ours", "theirs"))
    return (
        f"{row.name:40} {ours:7.1f} {theirs:7.1f}  {statistics.median(ratios):5.2f}  "
        f"{quantile(ratios, 0.1):4.2f} - {quantile(ratios, 0.9):4.2f}  {difference:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
