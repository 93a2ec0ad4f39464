"""Training a perceptual network: what `darkroom train` calls for a recipe with a `perceptual` section.

open the pictures of every source -> train -> scale the distance -> model folder (config, float16 weights, card)
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from darkroom import __version__
from darkroom.config import to_dict
from darkroom.data.batches import Batches, collate
from darkroom.data.distortions import DISTORTIONS, MARGIN, cut
from darkroom.data.sources import DataConfig, ImageDataset, open_dataset
from darkroom.errors import DarkroomError
from darkroom.features.perceptual import PerceptualNetwork
from darkroom.safe_files import new_folder, read_json, write_file, write_json, write_safetensors
from darkroom.training.distributed import World
from darkroom.training.loop import Hooks, Trainer
from darkroom.training.perceptual_step import PerceptualStep
from darkroom.training.recipe import Recipe

STAGE = "perceptual"
VALIDATION_IMAGES = 192
# Mean over all distortions at half strength; poor reconstructions then have 0.3 to 0.6, as with LPIPS.
TYPICAL_DISTANCE = 0.1


class LabelledPictures:
    """The pictures of several sources in a row. Sources with the same class names share their numbers, others get
    numbers of their own; a picture without a class has the label -1."""

    def __init__(self, config: DataConfig, split: str) -> None:
        sources = config.source if isinstance(config.source, list) else [config.source]
        if config.channels not in (1, 3):
            raise DarkroomError(
                f"a perceptual network is trained on colour or grey pictures, not on {config.channels} channels: set "
                '"data.channels" to 3 or 1 (the trained network takes any number)'
            )
        self.parts: list[ImageDataset] = [open_dataset(replace(config, source=s), split) for s in sources]
        self.pixels = self.parts[0].pixels
        if any(part.pixels != self.pixels for part in self.parts):
            raise DarkroomError('the sources have different pixel formats: set "data.pixels" to "uint8"')
        self._ends = list(accumulate(len(part) for part in self.parts))
        self._first_label: list[int | None] = []
        known: dict[tuple[str, ...], int] = {}
        self.classes = 0
        for part in self.parts:
            names = tuple(part.class_names) if "class_label" in part.fields else ()
            if names and names not in known:
                known[names] = self.classes
                self.classes += len(names)
            self._first_label.append(known.get(names))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = bisect_right(self._ends, index)
        example = self.parts[place][index - (self._ends[place - 1] if place else 0)]
        first = self._first_label[place]
        return {"image": example["image"], "class_label": -1 if first is None else first + int(example["class_label"])}

    def describe(self) -> dict[str, Any]:
        return {
            "examples": len(self),
            "classes": self.classes,
            "parts": [
                {"source": Path(str(part.config.source)).name, "examples": len(part), "digest": part.digest}
                for part in self.parts
            ],
        }


def train_perceptual(
    recipe: Recipe, folder: Path, *, resume: bool, device: torch.device, world: World, quiet: bool, dry_run: bool
) -> dict[str, Any]:
    """Train to the end (or to an interruption) and write `folder/model`; gives the summary."""
    config = recipe.perceptual
    assert config is not None
    data, held_out = LabelledPictures(recipe.data, "train"), LabelledPictures(recipe.data, "validation")
    torch.manual_seed(config.seed)
    network = PerceptualNetwork(config.network)
    step = PerceptualStep(network, config.objective, data.classes)
    parameters = sum(p.numel() for p in network.parameters())
    if not quiet and world.is_main:
        print(
            f"perceptual network: {parameters:,} parameters, {len(data):,} pictures ({data.classes} classes), "
            f"{config.steps:,} steps of {config.batch_size * config.accumulation * world.size}",
            flush=True,
        )
    if dry_run:
        return {"parameters": parameters, "data": data.describe()}
    if world.is_main:
        _prepare(recipe, folder, data, resume)
    shown = held_out if len(held_out) else data
    count = min(VALIDATION_IMAGES, len(shown))
    lots = -(-count // config.batch_size)  # each takes every lots-th picture, so that all lots have all sources
    chosen = [[i * len(shown) // count for i in range(k, count, lots)] for k in range(lots)]
    batches = [collate([shown[i] for i in lot], shown.pixels) for lot in chosen]

    def validate(_: int) -> dict[str, float]:
        return step.validation_loss(batches, config.seed)

    source = Batches(
        data,
        config.batch_size,
        config.seed,
        rank=world.rank,
        world_size=world.size,
        micro_batches=config.accumulation,
        prefetch=True,
    )
    with contextlib.closing(source):
        trainer = Trainer(
            STAGE, step, source, config, folder, device=device, world=world, hooks=Hooks(validate), quiet=quiet
        )
        result = trainer.run(resume)
    summary: dict[str, Any] = {
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 2),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "torch": torch.__version__,
        "darkroom": __version__,
        "seed": config.seed,
        "parameters": parameters,
        "interrupted": result.interrupted,
        **{k: round(v, 5) for k, v in result.last.items()},
    }
    if world.is_main:
        if not result.interrupted:
            if trainer.ema is not None:
                trainer.ema.swap()
            network.cpu().eval()
            summary["scaled_by"] = scale_distance(network, torch.cat([b["image"] for b in batches]))
            save_perceptual(network, folder / "model", summary | {"data": data.describe()})
        write_json(folder / "summary.json", summary)
    return summary


def _prepare(recipe: Recipe, folder: Path, data: LabelledPictures, resume: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = folder / "data.json"
    described = data.describe()
    if resume and facts.is_file() and read_json(facts) != described:
        raise DarkroomError(f"{folder}: the data has changed since this run began; start a new run")
    write_json(facts, described)
    text = yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)
    write_file(folder / "config.yaml", text.encode())


@torch.no_grad()
def scale_distance(network: PerceptualNetwork, images: Tensor) -> float:
    """Multiply the channel weights so that the mean distance over all kinds of distortion at half their strength is
    TYPICAL_DISTANCE; gives the factor. (B, C, H, W)"""
    if min(images.shape[-2:]) < 2 * MARGIN + 16:
        raise DarkroomError('perceptual training needs pictures of 32 pixels or more: raise "data.size"')
    strength = torch.full((len(images),), 0.5)
    means = [
        network(cut(images), cut(distort(images, strength, torch.Generator().manual_seed(0)))).mean()
        for distort in DISTORTIONS.values()
    ]
    factor = TYPICAL_DISTANCE / float(torch.stack(means).mean())
    for weights in network.log_weights:
        weights.add_(float(torch.tensor(factor).log()))
    return factor


def save_perceptual(network: PerceptualNetwork, place: Path, info: dict[str, Any]) -> None:
    """A folder that `load_perceptual` reads: config.json and float16 weights."""
    with new_folder(place, replaces=lambda old: (old / "config.json").is_file()) as folder:
        state = {k: v.detach().to(torch.float16).contiguous() for k, v in network.state_dict().items()}
        write_safetensors(folder / "model.safetensors", state)
        content = {"kind": "perceptual", "network": asdict(network.config), "info": info}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
