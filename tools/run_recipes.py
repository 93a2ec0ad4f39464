"""Run every shipped recipe for a few steps, both stages: `make recipes`.

Recipes whose images are not part of the repository take them from DARKROOM_DATA; without it a small stand-in made from
`shapes` is used, and said so. Nothing is kept.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from darkroom.config import merge
from darkroom.data.export import write_shapes
from darkroom.data.sources import SYNTHETIC, DataConfig, open_dataset
from darkroom.errors import DarkroomError
from darkroom.model_folder import bundled
from darkroom.train_job import train
from darkroom.training.recipe import read_recipe, recipe_names, resolve

STEPS = 2
FEW = {
    "steps": STEPS,
    "batch_size": 4,
    "validate_every": STEPS,
    "sample_every": STEPS,
    "checkpoint_every": STEPS,
    "evaluate.samples": 2,
    "evaluate.steps": 2,
    "data.limit": 8,
}
FEW_FIRST_STAGE = {
    "first_stage.train.steps": STEPS,
    "first_stage.train.batch_size": 2,
    "first_stage.train.validate_every": STEPS,
    "first_stage.train.sample_every": STEPS,
    "first_stage.train.checkpoint_every": STEPS,
}


def run(name: str, path: Path, work: Path, stand_in: Path) -> str:
    """Train recipe `name` for STEPS steps; gives a word about its data."""
    settings = read_recipe(path)
    overrides = dict(FEW)
    data, word = None, "its own data"
    if settings.get("first_stage", {}).get("train"):
        overrides |= FEW_FIRST_STAGE
    if name.startswith("shapes") or settings.get("data", {}).get("source") in SYNTHETIC:
        overrides["data.count"] = 40
    elif not os.environ.get("DARKROOM_DATA") or name.startswith("auto"):
        data, word = stand_in, "a stand-in made from shapes"
        overrides["data.exclude"] = {}
    if settings.get("perceptual"):
        overrides |= {"perceptual.steps": STEPS, "perceptual.batch_size": 4}
    given: dict[str, str] = {}
    trained = (settings.get("first_stage") or {}).get("train")
    if settings.get("steps") == 0:  # a first stage alone, or something for a given one
        overrides["steps"] = 0
        if trained and trained.get("autoencoder") is None:
            given["init_from"] = "emoji"
    first_stage = settings.get("first_stage") or {}
    known = (first_stage.get("name") or "emoji") in bundled() and not first_stage.get("path")
    if name.startswith("clothing-") and not known:
        given["first_stage"] = "emoji"  # in place of one that is trained elsewhere
    if settings.get("preview"):
        overrides |= {f"preview.{key}": FEW[key] for key in FEW if "." not in key}
        if not settings.get("first_stage"):
            given["first_stage"] = "emoji"
    resolve(merge(settings, {}))  # read strictly before anything is changed
    result = train(path, work / name, data=data, overrides=overrides, quiet=True, **given)
    index = "config.json" if settings.get("perceptual") else "darkroom.json"
    assert result.model is not None and (result.model / index).is_file()
    return word


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder) / "stand-in.tar"
        write_shapes(open_dataset(DataConfig(count=40)), stand_in)
        for name, path in sorted(recipe_names().items()):
            started = time.perf_counter()
            try:
                word = run(name, path, Path(folder), stand_in)
            except DarkroomError as error:
                failed += 1
                print(f"{name:<16} FAILED  {error}", flush=True)
                continue
            seconds = time.perf_counter() - started
            print(f"{name:<16} {STEPS} steps of each stage on {word}, {seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
