"""How often a model trained on `shapes` with several conditions obeys them: each alone, every pair, all together.

    python benchmarks/conditions_agreement.py MODEL [--count 300] [--kind single] [--steps 20]
        [--cfg-scale 2] [--guidance boxes=6 map=6] [--guidance-interval 0.5 1000]

Scenes of the validation split, never trained, with a fixed seed; image k has seed k. Of each scene the model is told
the caption, the boxes, the label map, or several of them, and the pixel rules of `shape_checker` and `shape_layout`
judge the picture against everything that was told: the caption (right objects in the right colours where it says), each
box (right shape, intersection over union of 0.5 or more, nothing else in the picture), the map (the same for every
label). What was not told is free. The 95 % intervals are Wilson's.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes_agreement import interval

import darkroom
from darkroom.cli.generate import parse_guidance
from darkroom.data.shape_layout import judge_boxes, judge_segmentation
from darkroom.data.shapes import Scene, draw_scene, find_objects, judge, render

FIELDS = ("text", "boxes", "segmentation")


def conditions_of(scenes: list[Scene], told: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of `generate`: what is told of the scenes."""
    values: dict[str, Any] = {}
    if "text" in told:
        values["prompt"] = [scene.caption for scene in scenes]
    if "boxes" in told:
        values["boxes"] = [torch.from_numpy(scene.boxes) for scene in scenes]
    if "segmentation" in told:
        values["segmentation"] = [torch.from_numpy(render(scene)[1]) for scene in scenes]
    return values


def verdicts(image: np.ndarray, scene: Scene, told: tuple[str, ...]) -> tuple[dict[str, bool], list[float]]:
    """Whether the image obeys each of the conditions, and the overlaps of those that have a place."""
    found = find_objects(image)
    ok: dict[str, bool] = {}
    overlaps = []
    for field in told:
        if field == "text":
            ok[field] = judge(found, scene.caption, scene.size).ok
            continue
        boxes = field == "boxes"
        result = judge_boxes(found, scene.boxes, scene.size) if boxes else judge_segmentation(found, render(scene)[1])
        ok[field] = result.ok
        overlaps.append(result.overlap)
    return ok, overlaps


def measure(model: Any, scenes: list[Scene], told: tuple[str, ...], **settings: Any) -> dict[str, Any]:
    """Generate one image per scene from what is told of it, and check each."""
    started = time.perf_counter()
    result = model.generate(
        **conditions_of(scenes, told), seed=list(range(len(scenes))), size=scenes[0].size, batch_size=50, **settings
    )
    seconds = time.perf_counter() - started
    checked = [verdicts(image, scene, told) for image, scene in zip(result.images, scenes, strict=True)]
    count = len(scenes)
    obeyed = sum(all(ok.values()) for ok, _ in checked)
    overlaps = [overlap for _, each in checked for overlap in each]
    return {
        "told": list(told),
        "count": count,
        "ok": round(obeyed / count, 4),
        "interval": [round(bound, 4) for bound in interval(obeyed, count)],
        "each": {field: round(sum(ok[field] for ok, _ in checked) / count, 4) for field in told},
        "overlap": round(float(np.mean(overlaps)), 4) if overlaps else None,
        "nfe": result.nfe,
        "seconds_per_image": round(seconds / count, 4),
        **settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model or run folder trained on shapes with several conditions")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first scene")
    parser.add_argument("--kind", default="single", choices=("single", "pair", "mixed"), help="objects in a scene")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--solver")
    parser.add_argument("--cfg-scale", type=float)
    parser.add_argument("--guidance", nargs="*", default=[], metavar="NAME=SCALE", help="of one condition alone")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="sigma/alpha")
    parser.add_argument("--json", type=Path, help="also write the records here")
    args = parser.parse_args()
    if args.model is None:
        print("give a model: darkroom train shapes-mixed -o runs/shapes-mixed; then runs/shapes-mixed")
        return
    model = darkroom.load(args.model)
    settings = {"steps": args.steps, "solver": args.solver, "guidance_scale": args.cfg_scale}
    settings = {k: v for k, v in settings.items() if v is not None}
    if args.guidance:
        settings["guidance"] = parse_guidance(args.guidance)
    if args.guidance_interval is not None:
        settings["guidance_interval"] = tuple(args.guidance_interval)
    size = tuple(model.defaults["size"])
    scenes = [
        draw_scene(i, split="validation", size=size, kind=args.kind) for i in range(args.first, args.first + args.count)
    ]
    known = [field for field in FIELDS if field in model.conditioner.fields]
    rows = []
    for number in range(1, len(known) + 1):
        for told in combinations(known, number):
            row = measure(model, scenes, told, **settings)
            rows.append(row)
            low, high = row["interval"]
            each = ", ".join(f"{field} {share:.1%}" for field, share in row["each"].items())
            overlap = "" if row["overlap"] is None else f"   overlap {row['overlap']:.2f}"
            print(
                f"{' + '.join(told):<28} {row['ok']:6.1%} [{low:.1%}, {high:.1%}] of {row['count']}   {each}{overlap}"
                f"   {row['nfe']} calls, {row['seconds_per_image'] * 1000:.0f} ms an image",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
