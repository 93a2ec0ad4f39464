"""Inpainting against OpenCV's methods and the mean colour: perceptual distance and FD, on 40-50 % masks and on all.

    python benchmarks/inpainting_table.py --data clothing-128/clothing-128-val.tar --size 128 128 \\
        [--model clothing-inpaint] [--model KL=runs/kl/model] [--count 480] [--steps 20] [--speed]
        [-o runs/inpainting-table]

Masks are those of LaMa in equal parts (thin, medium, thick, boxes), of 40 to 50 % of the picture, and of 2 to 50 %, as
in the paper's table 7; image k has the same mask for every method, and for models seed k. Every method fills the same
hole: pixels outside of the mask are those of the picture, for all of them. Scores are of whole pictures against the
same pictures before they were masked: the mean perceptual distance, FD and KD of the features, PSNR and SSIM. Each row
leaves a record with its protocol; together they become table.md and, with --pictures, pictures.png. What was
interrupted goes on.

--speed adds what table 6 of the paper compares (pixels against latents, at equal parameters): training and sampling of
the models in samples per second of processor time, four at once, measured here in turns; --speed-only that alone.

Baselines: Telea 2004 and Navier-Stokes (Bertalmio et al. 2001) as OpenCV has them, radius 3; the mean colour of what is
known; and the smooth continuation that Darkroom itself begins with (push-pull).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from restoration import speeds

import darkroom
from darkroom.conditioning.filling import filled
from darkroom.config import to_dict
from darkroom.data.io import image_grid, write_image
from darkroom.data.latent_cache import module_hash
from darkroom.data.masks import RandomMask
from darkroom.data.sources import DataConfig, ImageDataset, open_dataset
from darkroom.editing import Editor, EditSettings
from darkroom.errors import DarkroomError
from darkroom.evaluation.checks import pair_check
from darkroom.evaluation.environment import environment
from darkroom.evaluation.extractors import PerceptualDistance, default_extractors, open_extractor
from darkroom.evaluation.feature_files import FeatureFiles, Pictures, observe
from darkroom.evaluation.intervals import interval
from darkroom.evaluation.measure import Seen, distance_scores, mean_scores
from darkroom.evaluation.picture_sources import StoredPictures
from darkroom.evaluation.protocol import (
    Extraction,
    ImageSet,
    Record,
    Sampling,
    check_comparable,
    columns_of,
    write_record,
)
from darkroom.latent_diffusion import LatentDiffusion

MASKS = {"40-50 %": RandomMask((0.4, 0.5)), "all": RandomMask((0.02, 0.5))}
PART = 8  # images between two savings
TIMED = 4  # images, of --speed
Fill = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""(H, W, 3) uint8, (H, W) bool, the image's number -> (H, W, 3) uint8, of which what is under the mask counts."""


@dataclass(frozen=True)
class Method:
    """digest: of what decides its pictures, weights or words; sampling: what a record says about how it was made."""

    name: str
    fill: Fill
    digest: str
    sampling: Mapping[str, Any]


def mean_colour(image: np.ndarray, mask: np.ndarray, _: int) -> np.ndarray:
    out = image.copy()
    out[mask] = np.rint(image[~mask].mean(0)).astype(np.uint8)
    return out


def continued(image: np.ndarray, mask: np.ndarray, _: int) -> np.ndarray:
    picture = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    smooth = filled(picture, torch.from_numpy(mask.astype(np.float32))[None, None])
    return smooth[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()


def of_opencv(name: str) -> Fill:
    try:
        import cv2
    except ImportError:
        raise SystemExit("the baselines are those of OpenCV: pip install opencv-python-headless") from None
    flag = {"Telea": cv2.INPAINT_TELEA, "Navier-Stokes": cv2.INPAINT_NS}[name]
    # A picture is a picture to these methods whatever the order of its colours.
    return lambda image, mask, _: cv2.inpaint(np.ascontiguousarray(image), mask.astype(np.uint8) * 255, 3, flag)


def baselines() -> list[Method]:
    rows: dict[str, Fill] = {"mean colour": mean_colour, "push-pull": continued}
    rows |= {f"OpenCV {name}": of_opencv(name) for name in ("Telea", "Navier-Stokes")}
    return [Method(name, fill, hashlib.sha256(name.encode()).hexdigest(), {"generated": False})
            for name, fill in rows.items()]  # fmt: skip


def of_model(name: str, place: str, steps: int | None, solver: str | None, device: str) -> Method:
    model = darkroom.load(place, device=device)
    if not isinstance(model, LatentDiffusion):
        raise SystemExit(f"{place} is a first stage only")
    editor = Editor(model)
    chosen = {"steps": steps or model.defaults["steps"], "solver": solver}
    nfe = 0

    def fill(image: np.ndarray, mask: np.ndarray, number: int) -> np.ndarray:
        nonlocal nfe
        result = editor(image, mask, EditSettings(seeds=(number,), steps=steps, solver=solver))
        nfe = result.settings[0]["nfe"]
        chosen["solver"] = result.settings[0]["request"]["solver"]
        return result.images[0]

    probe = np.zeros((8, 8), bool)
    probe[2:4, 2:4] = True
    fill(np.zeros((8, 8, 3), np.uint8), probe, 0)  # what cannot be is said now, and the solver is known
    sampling = {**chosen, "seed": 0, "nfe": nfe, "weights": "ema"}
    key = f"{module_hash(model)}{chosen}"
    return Method(name, fill, hashlib.sha256(key.encode()).hexdigest(), sampling)


class FilledPictures:
    """The first `count` images of a data set with masks, evenly spread, each filled by a method."""

    def __init__(self, dataset: ImageDataset, count: int, method: Method, distance: PerceptualDistance) -> None:
        self.dataset, self.count, self.method = dataset, count, method
        self.check = pair_check(dataset, distance)

    def __len__(self) -> int:
        return self.count

    def example(self, number: int) -> dict[str, Any]:
        return self.dataset[number * len(self.dataset) // self.count]

    def filled(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(image, mask, result) of one."""
        example = self.example(number)
        image = example["image"].permute(1, 2, 0).contiguous().numpy()
        mask = example["repaint_mask"][0].numpy() >= 0.5
        result = np.where(mask[..., None], self.method.fill(image, mask, number), image)
        return image, mask, result

    def read(self, numbers: Sequence[int]) -> Pictures:
        started = time.perf_counter()
        made = [self.filled(n) for n in numbers]
        seconds = (time.perf_counter() - started) / len(numbers)
        images = torch.from_numpy(np.stack([result for _, _, result in made]))
        values = self.check(images, [self.example(n) for n in numbers])
        values["seconds"] = torch.full((len(numbers),), seconds)
        masks = hashlib.sha256(b"".join(np.packbits(mask).tobytes() for _, mask, _ in made)).hexdigest()
        return Pictures(images, values, masks)


@torch.inference_mode()
def score(
    dataset: ImageDataset, rule: RandomMask, count: int, method: Method, folder: Path, device: torch.device
) -> Record:
    """One row: its record, also written to `folder`."""
    extractor, (distance, _) = open_extractor("darkroom", device), default_extractors(device)
    source = FilledPictures(dataset, count, method, distance)
    real = StoredPictures(dataset, [n * len(dataset) // count for n in range(count)])
    parts = folder / "parts"
    reference = Seen(FeatureFiles(parts / f"reference-{dataset.digest[:8]}-{count}", count, 64), extractor)
    name = "".join(c if c.isalnum() else "-" for c in method.name)
    mine = FeatureFiles(parts / f"{name}-{method.digest[:8]}-{dataset.digest[:8]}-{count}", count, PART)
    samples = Seen(mine, extractor)
    observe(real, reference.files, extractor)
    done = 0

    def report(images: int) -> None:
        nonlocal done
        done += images
        if done % (PART * 10) == 0 or done == count:
            print(f"{folder.name}, {method.name}: {done}/{count}", flush=True)

    observe(source, mine, extractor, report=report)
    measured = distance_scores(samples, reference, ["fd", "kd"])
    network = {distance.name: Extraction(distance.name, distance.weights, "none")}
    measured.scores += mean_scores(mine, [distance.name, "PSNR", "SSIM", "seconds"], network)
    size = list(dataset.size)
    record = Record(
        scores=measured.scores,
        reference=ImageSet(
            source=[Path(str(s)).name for s in _list(dataset.config.source)],
            split="whole",
            digest=reference.files.digest(),
            examples=len(dataset),
            count=count,
            size=size,
            crop="largest centred rectangle, Lanczos",
        ),
        sampling=Sampling(
            model=method.name,
            digest=method.digest,
            count=count,
            size=size,
            conditions=["image", "repaint_mask"],
            conditions_digest=mine.digest("conditions"),
            made={"repaint_mask": to_dict(rule)},
            **method.sampling,
        ),
        environment=environment(device, 1),
        warnings=measured.warnings,
    )
    write_record(record, folder / f"{name}.json")
    return record


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# What is best in a column: the least or the greatest.
BEST: dict[str, Callable[[Sequence[float]], float]] = {"PSNR": max, "SSIM": max}


def table(records: Mapping[str, Sequence[Record]]) -> str:
    """Markdown: a row for each method and kind of mask, 95 % intervals behind the numbers, the best in bold."""
    first = next(iter(records.values()))
    columns = [c for c in columns_of(first) if c != "seconds"]
    lines = ["| masks | method | " + " | ".join(columns) + " | s/image |", "|---" * (len(columns) + 3) + "|"]
    for masks, rows in records.items():
        check_comparable([without_time(r) for r in rows], [r.sampling.model for r in rows])
        best = {c: BEST.get(c, min)([r.values[c] for r in rows]) for c in columns}
        for row in rows:
            cells = []
            for column in columns:
                found = row.score(column)
                assert found is not None
                ends = interval(found.value, found.deviations)
                text = f"{found.value:.4g}" + ("" if ends is None else f" ({ends[0]:.4g}..{ends[1]:.4g})")
                cells.append(f"**{text}**" if found.value == best[column] else text)
            lines.append(f"| {masks} | {row.sampling.model} | {' | '.join(cells)} | {row.values['seconds']:.3f} |")
    return "\n".join(lines) + "\n"


def without_time(record: Record) -> Record:
    """Seconds are no score: they may be measured on any machine."""
    return replace(record, scores=[s for s in record.scores if s.metric != "seconds"])


@torch.inference_mode()
def pictures(dataset: ImageDataset, count: int, methods: Sequence[Method], total: int, device: torch.device) -> Any:
    """A grid: masked picture, what each method makes of it, and the picture; image k with seed k."""
    distance, _ = default_extractors(device)
    rows: list[np.ndarray] = []
    for number in range(count):
        cells: list[np.ndarray] = []
        for method in methods:
            image, mask, result = FilledPictures(dataset, total, method, distance).filled(number)
            cells = cells or [np.where(mask[..., None], np.uint8(127), image)]
            cells.append(result)
        rows += [*cells, image]
    return image_grid(rows, columns=len(methods) + 2)


def named(word: str) -> tuple[str, str]:
    """ "KL=runs/kl" -> ("KL", "runs/kl"); a place alone is its own name."""
    name, found, place = word.partition("=")
    return name, place if found else word


def speed_table(models: Mapping[str, str], given: argparse.Namespace) -> str:
    """Markdown: training and sampling of every model in samples per second of processor time."""
    opened = {name: darkroom.load(place, device=given.device) for name, place in models.items()}
    config = DataConfig(
        source=given.data, size=tuple(given.size), validation=0.0, repaint_mask=MASKS["40-50 %"], background="white"
    )
    dataset = open_dataset(config, "train")
    found = speeds(opened, [dataset[n] for n in range(TIMED)], given.steps)
    lines = ["| model | parameters | training samples/s | sampling samples/s | steps |", "|---" * 5 + "|"]
    for name, (training, sampling) in found.items():
        size = sum(p.numel() for p in opened[name].denoiser.parameters()) / 1e6
        steps = given.steps or opened[name].defaults["steps"]
        lines.append(f"| {name} | {size:.2f} M | {training:.3g} | {sampling:.3g} | {steps} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="held-out pictures: tars or folders")
    parser.add_argument("--size", nargs=2, type=int, default=(128, 128), metavar=("W", "H"))
    parser.add_argument("--model", action="append", default=[], metavar="[NAME=]MODEL")
    parser.add_argument("--count", type=int, help="images [default: all]")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--solver")
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS))
    parser.add_argument("--pictures", type=int, default=0, help="rows of a picture to look at")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/inpainting-table"))
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if not given.data:
        print("left out: give held-out pictures with --data")
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    models = dict(map(named, given.model or ["clothing-inpaint"]))
    given.output.mkdir(parents=True, exist_ok=True)
    if given.speed or given.speed_only:
        text = speed_table(models, given)
        (given.output / "speed.md").write_text(text)
        print(text)
    if given.speed_only:
        return
    methods = baselines()
    for name, place in models.items():
        methods.append(of_model(name, place, given.steps, given.solver, given.device))
    records: dict[str, list[Record]] = {}
    for masks in given.masks:
        config = DataConfig(
            source=given.data, size=tuple(given.size), validation=0.0, repaint_mask=MASKS[masks], background="white"
        )
        dataset = open_dataset(config, "train")
        count = min(given.count or len(dataset), len(dataset))
        folder = given.output / masks.replace(" ", "").replace("%", "")
        folder.mkdir(parents=True, exist_ok=True)
        records[masks] = [score(dataset, MASKS[masks], count, method, folder, device) for method in methods]
        if given.pictures:
            sheet = pictures(dataset, given.pictures, methods, count, device)
            write_image(sheet, folder / "pictures.png")
    text = table(records)
    (given.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except DarkroomError as problem:
        print(f"inpainting_table: {problem}", file=sys.stderr)
        sys.exit(2)
