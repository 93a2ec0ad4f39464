"""The regression network that super-resolution is measured against: the U-Net of the recipe `clothing-sr` on the small
picture itself, whose last layer holds the pixels of each 4x4 block, trained to the least absolute error.

    python benchmarks/regression_baseline.py --output runs/regression [--data DIR] [--recipe clothing-sr]
                                             [--steps 4000 | --minutes 40] [--batch-size 32] [--threads 1] [--resume]

    image = bicubic(small) + pixel_shuffle(U-Net(small, time 0))          loss = mean |image - truth|

Data, flips, optimiser, averaging and precision are the recipe's; parameters are those of its denoiser but for the
first and the last layer. --minutes measures a few steps and chooses how many fit. Leaves network.safetensors and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.config import from_dict, to_dict
from darkroom.data.batches import Batches, collate
from darkroom.data.resizing import bicubic
from darkroom.data.sources import open_dataset
from darkroom.errors import DarkroomError
from darkroom.features.psnr import psnr
from darkroom.networks.unet import UNet, UNetConfig
from darkroom.recipe_source import new_recipe
from darkroom.safe_files import new_file, read_json, read_safetensors, write_file, write_safetensors
from darkroom.training.loop import Hooks, LoopConfig, Phase, Trainer, all_parameters
from darkroom.training.recipe import Recipe

WEIGHTS, CONFIG = "network.safetensors", "network.json"
TIMED_STEPS = 12


class Regression(nn.Module):
    """(B, 3, h, w) in [-1, 1] -> (B, 3, h*factor, w*factor)."""

    def __init__(self, network: UNetConfig, factor: int, channels: int = 3) -> None:
        super().__init__()
        self.factor = factor
        self.config = replace(network, in_channels=channels, out_channels=channels * factor**2)
        self.network = UNet(self.config)

    def forward(self, small: Tensor) -> Tensor:
        height, width = small.shape[2:]
        multiple = self.config.size_multiple
        padded = F.pad(small, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        blocks = self.network(padded, torch.zeros(len(small), device=small.device))
        detail = F.pixel_shuffle(blocks, self.factor)[..., : height * self.factor, : width * self.factor]
        return bicubic(small, (detail.shape[2], detail.shape[3])) + detail


class RegressionStep(nn.Module):
    """What the training loop calls."""

    def __init__(self, regression: Regression) -> None:
        super().__init__()
        self.regression = regression.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.phases = [Phase("regression", self, all_parameters([self]))]
        self.modules: dict[str, nn.Module] = {"regression": regression}
        self.ema_modules = self.modules

    def forward(self, batch: dict[str, Any], _: torch.Generator, __: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.regression(batch["low_resolution"]).float()
        return (image - batch["image"]).abs().mean(), {}


def save_regression(regression: Regression, folder: Path, facts: dict[str, Any]) -> None:
    with new_file(folder / WEIGHTS, lambda old: True) as file:
        write_safetensors(file, regression.state_dict())
    known = {"network": to_dict(regression.config), "factor": regression.factor, **facts}
    write_file(folder / CONFIG, (json.dumps(known, indent=1) + "\n").encode())


def load_regression(folder: Path) -> tuple[Regression, dict[str, Any]]:
    """The trained network, and the facts that were saved with it."""
    if not (folder / WEIGHTS).is_file():
        raise DarkroomError(f"{folder}: no regression network; make one with benchmarks/regression_baseline.py")
    facts = read_json(folder / CONFIG)
    regression = Regression(from_dict(UNetConfig, facts["network"]), facts["factor"])
    regression.load_state_dict(read_safetensors(folder / WEIGHTS))
    return regression.eval(), facts


def steps_in(minutes: float, step: RegressionStep, batches: Batches, config: LoopConfig, folder: Path) -> int:
    """How many steps fit, by the time of a few on a copy."""
    rehearsal = Trainer("rehearsal", step, batches, replace(config, steps=10**6), folder, quiet=True)
    rehearsal.run_step()
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        rehearsal.run_step()
    return max(1, int(60 * minutes * TIMED_STEPS / (time.perf_counter() - started)))


def train_regression(
    recipe: Recipe, folder: Path, minutes: float | None = None, resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    rule = recipe.data.low_resolution
    if rule is None or rule.factor < 2:
        raise DarkroomError(f"{recipe.name} makes no smaller pictures; name a recipe with data.low_resolution.factor")
    torch.manual_seed(recipe.seed)
    network = recipe.denoiser.network
    assert isinstance(network, UNetConfig)
    regression = Regression(network, rule.factor, recipe.data.channels)
    step = RegressionStep(regression)
    data, validation = open_dataset(recipe.data), open_dataset(recipe.data, "validation")
    config = from_dict(LoopConfig, {name: getattr(recipe, name) for name in LoopConfig.__dataclass_fields__})
    batches = Batches(data, config.batch_size, config.seed, prefetch=True)
    plan = folder / "plan.json"
    if resume:
        config = replace(config, steps=read_json(plan)["steps"])
    elif minutes is not None:
        state = {name: value.clone() for name, value in regression.state_dict().items()}
        config = replace(config, steps=steps_in(minutes, step, batches, config, folder))
        regression.load_state_dict(state)
    write_file(plan, json.dumps({"steps": config.steps, "minutes": minutes}).encode())
    shown = collate([validation[i] for i in range(min(64, len(validation)))], data.pixels)

    @torch.no_grad()
    def validate(_: int) -> dict[str, float]:
        return {"psnr": float(psnr(regression(shown["low_resolution"]).clamp(-1, 1), shown["image"]).mean())}

    trainer = Trainer("regression", step, batches, config, folder, hooks=Hooks(validate), quiet=quiet)
    result = trainer.run(resume)
    batches.close()
    if trainer.ema is not None:
        trainer.ema.swap()
    facts = {
        "recipe": recipe.name,
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 2),
        "parameters": sum(p.numel() for p in regression.parameters()),
        "interrupted": result.interrupted,
        **validate(0),
    }
    save_regression(regression, folder, facts)
    return facts


def recipe_of(name: str, data: str | None, steps: int | None, batch_size: int | None) -> Recipe:
    changes: dict[str, Any] = {"first_stage": None}
    changes |= {} if steps is None else {"steps": steps}
    changes |= {} if batch_size is None else {"batch_size": batch_size}
    return new_recipe(name, data=data, changes=changes)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--data", default=os.environ.get("DARKROOM_DATA"))
    parser.add_argument("--recipe", default="clothing-sr")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if options.output is None or options.data is None:
        print("left out: give --output DIR, and the images with --data or DARKROOM_DATA")
        return 0
    torch.set_num_threads(options.threads)
    recipe = recipe_of(options.recipe, options.data, options.steps, options.batch_size)
    facts = train_regression(recipe, options.output, options.minutes, options.resume)
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
