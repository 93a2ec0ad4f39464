"""Decides how to train on images that come without a recipe, and says beforehand what a recipe will cost.

The seconds and the memory are measured by running a few real steps on random images of the right shape, because no
formula knows a machine.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from darkroom.build import (
    build_conditioner,
    build_denoiser,
    build_first_stage,
    conditioner_config,
    denoiser_config,
    pixel_first_stage,
    with_grain,
)
from darkroom.config import from_dict, merge, to_dict
from darkroom.data.batches import collate
from darkroom.data.inspection import glimpse
from darkroom.data.sources import DataConfig, ImageDataset, open_dataset
from darkroom.errors import DarkroomError
from darkroom.first_stage.autoencoder import nearest_sizes
from darkroom.first_stage.first_stage import FirstStage
from darkroom.interop.text_towers import find_weights as find_text_weights
from darkroom.model_io import load_first_stage
from darkroom.training.denoiser_step import DenoiserStep
from darkroom.training.first_stage_step import FirstStageStep, FirstStageTrainConfig
from darkroom.training.loop import Batch, LoopConfig, Trainer
from darkroom.training.progress import duration, memory_gib
from darkroom.training.recipe import Recipe, find_recipe, read_recipe

VALIDATION_IMAGES = 256
LOOKS_SHARE = 0.05  # of the denoiser's time that validation takes at most, and as much for samples
FIRST_STAGE_SHARE = 0.35  # of a time budget; reconstructions are good long before samples are
LARGE_MINUTES = 180  # from here on a CPU can train 128x128
SIDES = (32, 64, 128)
FIRST = "first_stage.train."
TIMED_PLACES = 4  # in the course of a stage
TIMED_STEPS = 2  # at each of them, after one that warms up


@dataclass(frozen=True)
class StagePlan:
    """What one stage will do. `seconds_per_step` and `memory_gib` are None until measured."""

    steps: int
    images_per_step: int
    parameters: int
    seconds_per_step: float | None = None
    memory_gib: float | None = None
    network: str = ""  # its kind, where there are several

    @property
    def seconds(self) -> float | None:
        return None if self.seconds_per_step is None else self.steps * self.seconds_per_step


@dataclass(frozen=True)
class Plan:
    """The decisions of a run, for people to read before it starts. Where no denoiser is trained, it and `conditioning`
    are None."""

    recipe: str
    images: int
    image_size: tuple[int, int]
    image_channels: int
    downsampling: int
    latent_channels: int
    conditioning: list[str] | None
    first_stage: StagePlan | None
    denoiser: StagePlan | None


def automatic_recipe(source: str, minutes: float | None, data: Mapping[str, Any], gpu: bool = False) -> dict[str, Any]:
    """Recipe settings for a folder or tar of images: resolution, f, conditioning and sizes for this machine and budget.

    Captions win over classes, classes over nothing. On a CPU, below three hours, images become 64x64 with f = 4; with
    more time or a GPU 128x128 with f = 8; but of 32, 64, 128 never more than the shorter side of the median image.
    Images without colour are trained with one channel, images of more than 8 bits as they are. `data` holds settings
    that the caller fixed.
    """
    stated = from_dict(DataConfig, {"source": source, **data}, "data")
    look = None if stated.is_shapes or stated.is_synthetic else glimpse(stated.source)
    seen: dict[str, Any] = {}
    if look is not None and look.pixels != "uint8":
        seen["pixels"] = look.pixels
    if look is not None and (look.grey or look.channels not in (1, 3)):
        seen["channels"] = look.channels
    found = open_dataset(from_dict(DataConfig, {"source": source, **seen, **data}, "data"))
    limit = 128 if gpu or (minutes is not None and minutes >= LARGE_MINUTES) else 64
    if "size" in data:
        limit = min(limit, *found.config.width_height)
    elif look is not None:
        limit = max([side for side in SIDES if side <= min(limit, look.short_side)], default=SIDES[0])
    settings = read_recipe(find_recipe("auto-128" if limit >= 128 else "auto-64"))
    chosen: dict[str, Any] = {"source": source, "size": limit} | seen | dict(data)
    settings["description"] = f"Made by `darkroom train {Path(source).name}`."
    if "channels" not in data and chosen.get("channels") == 1:
        settings["description"] += " No colour was seen, so there is one channel; data.channels=3 keeps three."
    conditioner: dict[str, Any] = {}
    if "text" in found.fields:
        conditioner["text"] = settings["conditioner"]["text"]
    elif "class_label" in found.fields and len(found.class_names) > 1:
        conditioner["class"] = settings["conditioner"]["class"]
    settings["conditioner"] = conditioner
    settings["name"] = Path(source).name.split(".")[0] or "images"
    settings["data"] = merge(settings.get("data") or {}, chosen)
    return settings


class _RandomBatches:
    """Random images of the right shape with real labels, captions, boxes, ...: enough to time a step."""

    def __init__(self, shape: tuple[int, ...], batch_size: int, conditions: Mapping[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch: Batch = {"image": torch.rand(batch_size, *shape, generator=generator) * 2 - 1}
        self.batch |= collate([dict(conditions)] * batch_size)

    def batch_at(self, train_step: int, micro: int = 0) -> Batch:
        return dict(self.batch)


class Planner:
    """Builds a recipe's parts without training them."""

    def __init__(
        self, recipe: Recipe, data: ImageDataset, device: torch.device, stated: Mapping[str, Any] | None = None
    ) -> None:
        """stated: widths in `denoiser.network` that the recipe's author wrote down and that must be what follows."""
        self.recipe, self.data, self.device = recipe, data, device
        self.first_stage = self._first_stage()
        self._check_images()
        config = conditioner_config(recipe.conditioner, data)
        self.conditioner = build_conditioner(config, self.first_stage)
        channels = recipe.data.channels if self.first_stage is None else self.first_stage.latent_channels
        self.denoiser_config = denoiser_config(recipe.denoiser, stated or {}, channels, self.conditioner)
        self.denoiser = build_denoiser(self.denoiser_config)
        self._check_size()

    def _first_stage(self) -> FirstStage | None:
        choice = self.recipe.first_stage
        if choice.train is not None and choice.train.init_from is not None:
            first_stage = load_first_stage(choice.train.init_from, torch.device("cpu"))
            return with_grain(first_stage, choice.train.add_grain).requires_grad_(True)
        if choice.train is not None:
            pixels = to_dict(self.recipe.data.pixel_format)
            return build_first_stage(to_dict(choice.train.autoencoder) | {"pixels": pixels})
        if choice.name is None and choice.path is None:
            return pixel_first_stage(self.recipe.data.channels, self.recipe.data.pixel_format)
        return load_first_stage(choice.name or str(choice.path), torch.device("cpu"))

    def _check_images(self) -> None:
        """The first stage must take the data's images: their channels here, their size in `_check_size`."""
        channels = self.recipe.data.channels
        if self.first_stage is not None and self.first_stage.image_channels != channels:
            key = "first_stage.train.autoencoder.in_channels" if self._trains_new() else "the first stage's in_channels"
            raise DarkroomError(
                f'"{key}" is {self.first_stage.image_channels} but the data has "data.channels" {channels}: '
                "make them equal"
            )
        network = None if self.recipe.first_stage.train is None else self.recipe.first_stage.train.autoencoder
        if self._trains_new() and network is not None and network.out_channels != channels:
            raise DarkroomError(
                f'"first_stage.train.autoencoder.out_channels" is {network.out_channels} but the data has '
                f'"data.channels" {channels}: make them equal'
            )
        pixels = self.recipe.data.pixel_format
        if self.first_stage is not None and self.first_stage.pixels != pixels:
            own = self.first_stage.pixels
            raise DarkroomError(
                f"the first stage works on {own.dtype} pixels from {own.low:g} to {own.high:g}, the data has "
                f'{pixels}: set "data.pixels" to {own.dtype} and "data.value_range" to [{own.low:g}, {own.high:g}]'
            )

    def _trains_new(self) -> bool:
        train = self.recipe.first_stage.train
        return train is not None and train.init_from is None

    def _check_size(self) -> None:
        """Sides that both stages can take, found before hours of training."""
        f = 1 if self.first_stage is None else self.first_stage.downsampling
        factor = f * self.recipe.denoiser.network.size_multiple if self.recipe.steps else f
        width, height = self.recipe.data.width_height
        if width % factor or height % factor:
            near = " or ".join(f"{w}x{h}" for w, h in nearest_sizes(width, height, factor))
            raise DarkroomError(
                f'"data.size" {width}x{height} does not fit this recipe: sides must be multiples of {factor}, '
                f"for example {near}"
            )
        check_crop(self.recipe, f)

    def plan(self, measure: bool = False) -> Plan:
        recipe, first_stage = self.recipe, self.first_stage
        train = recipe.first_stage.train
        stage = None
        if train is not None:
            assert first_stage is not None
            stage = self._stage(
                train, first_stage, lambda: FirstStageStep(first_stage.trainable, train.objective), measure
            )
        denoiser = None
        if recipe.steps > 0:
            denoiser = self._stage(
                recipe,
                nn.ModuleList([self.denoiser, self.conditioner]),
                lambda: DenoiserStep(self.denoiser, self.conditioner, first_stage, recipe.objective),
                measure,
            )
            denoiser = replace(denoiser, network=recipe.denoiser.network.kind)
        return Plan(
            recipe=recipe.name,
            images=len(self.data),
            image_size=recipe.data.width_height,
            image_channels=recipe.data.channels,
            downsampling=1 if first_stage is None else first_stage.downsampling,
            latent_channels=recipe.data.channels if first_stage is None else first_stage.latent_channels,
            conditioning=None if denoiser is None else list(self.conditioner.fields),
            first_stage=stage,
            denoiser=denoiser,
        )

    def rehearse(self) -> None:
        """Both objectives once on one example each: settings that cannot work are found before hours of work."""
        one = LoopConfig(batch_size=1)
        train = self.recipe.first_stage.train
        if train is not None and self.first_stage is not None:
            self._forward(FirstStageStep(self.first_stage.trainable, train.objective), one)
        if self.recipe.steps > 0:
            if self.recipe.init_from is None:  # such a model brings its text towers along
                find_text_weights(self.conditioner)
            self._forward(DenoiserStep(self.denoiser, self.conditioner, self.first_stage, self.recipe.objective), one)

    def _forward(self, step: FirstStageStep | DenoiserStep, config: LoopConfig) -> None:
        batch = self._random_batches(step, config).batch_at(0)
        step.phases[0].module(batch, torch.Generator().manual_seed(0), 0)

    def _stage(self, config: LoopConfig, module: nn.Module, step: Any, measure: bool) -> StagePlan:
        images = config.batch_size * config.accumulation
        parameters = sum(p.numel() for p in module.parameters())
        plan = StagePlan(config.steps, images, parameters)
        return replace(plan, **self._time(config, step())) if measure else plan

    def _random_batches(self, step: Any, config: LoopConfig) -> _RandomBatches:
        """What `step` is fed with in training, but random."""
        width, height = self.recipe.data.width_height
        shape: tuple[int, ...] = (self.recipe.data.channels, height, width)
        example = self.data[0]
        fields = [f for f in self.conditioner.fields if f in example and f != "image"]
        if self.recipe.init_from is not None and "text" in fields:
            example = {**example, "text": None}  # the vocabulary comes with that model; nothing needs none
        batches = _RandomBatches(shape, config.batch_size, {f: example[f] for f in fields})
        if isinstance(step, DenoiserStep) and self.first_stage is not None:
            f = self.first_stage.downsampling
            moments = torch.zeros(config.batch_size, 2 * self.first_stage.latent_channels, height // f, width // f)
            if "image" not in self.conditioner.fields:
                del batches.batch["image"]
            batches.batch["moments"] = moments
        return batches

    def _time(self, config: LoopConfig, step: Any) -> dict[str, Any]:
        """Mean seconds of a step over the whole stage, because steps differ: crops first, the discriminator later."""
        batches = self._random_batches(step, config)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer("plan", step, batches, config, Path(folder), device=self.device, quiet=True)
            means = []
            for part in range(TIMED_PLACES):
                trainer.train_step = config.steps * (2 * part + 1) // (2 * TIMED_PLACES)
                seconds = []
                for _ in range(TIMED_STEPS + 1):
                    started = time.perf_counter()
                    trainer.run_step()
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - started)
                means.append(statistics.median(seconds[1:]))
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else memory_gib()
        return {"seconds_per_step": statistics.mean(means), "memory_gib": memory}


def check_crop(recipe: Recipe, f: int) -> None:
    """Raises DarkroomError where the crops on which the first stage is trained do not fit in the images."""
    train, (width, height) = recipe.first_stage.train, recipe.data.width_height
    crop = None if train is None else train.objective.crop
    if crop is not None and (crop % f or crop < f or crop > min(width, height)):
        raise DarkroomError(
            f'"first_stage.train.objective.crop" is {crop}: it must be a multiple of {f} that fits in the '
            f"{width}x{height} images; --set first_stage.train.objective.crop=null trains on whole images"
        )


def fit_minutes(recipe: Recipe, plan: Plan, minutes: float, fixed: Collection[str] = ()) -> Recipe:
    """The recipe with the steps of both stages set so that they fill `minutes`, given a measured plan.

    fixed: dotted keys that someone has stated. They stay; where they are the steps of a stage, the other gets the rest.
    Raises DarkroomError when nothing is left for it.
    """
    left = minutes * 60
    train, first, second = recipe.first_stage.train, plan.first_stage, plan.denoiser
    alone = recipe.steps == 0  # a first stage alone
    stated = {"first stage": train is not None and f"{FIRST}steps" in fixed, "denoiser": not alone and "steps" in fixed}
    for name, stage in (("first stage", first), ("denoiser", second)):
        if stated[name] and stage is not None and stage.seconds is not None:
            left -= stage.seconds
    if left <= 0 and ((train is not None and not stated["first stage"]) or not (alone or stated["denoiser"])):
        taken = duration(minutes * 60 - left)
        raise DarkroomError(f"the steps that were stated take {taken} of {minutes:g} minutes: that leaves nothing")
    if train is not None and not stated["first stage"]:
        assert first is not None and first.seconds_per_step is not None
        share = 1.0 if alone or stated["denoiser"] else FIRST_STAGE_SHARE
        steps = max(1, int(left * share / first.seconds_per_step))
        left *= 1 - share
        factor = steps / max(1, train.steps)
        train = _with_steps(train, steps, FIRST, fixed)
        train = replace(train, objective=_with_starts(train.objective, factor, f"{FIRST}objective.", fixed))
        recipe = replace(recipe, first_stage=replace(recipe.first_stage, train=train))
    if alone or stated["denoiser"]:
        return recipe
    assert second is not None and second.seconds_per_step is not None
    affordable = left / second.seconds_per_step
    validation, samples = looks = _steps_of_looks(recipe)
    rare = {"validate_every": math.ceil(validation / LOOKS_SHARE), "sample_every": math.ceil(samples / LOOKS_SHARE)}
    recipe = _with_steps(recipe, max(1, int(affordable)), "", fixed, rare)
    # They come out of the same time, those at the end included.
    share = validation / recipe.validate_every + samples / recipe.sample_every
    return replace(recipe, steps=max(1, int(affordable / 2), int((affordable - sum(looks)) / (1 + share))))


def _steps_of_looks(recipe: Recipe) -> tuple[float, float]:
    """What one validation and one grid of samples cost, in training steps: a forward pass is a third of a step."""
    images = 3.0 * recipe.batch_size * recipe.accumulation * recipe.objective.draws
    evaluate = recipe.evaluate
    passes = evaluate.samples * evaluate.steps * (1 if evaluate.guidance_scale == 1 else 2)
    return VALIDATION_IMAGES / images, passes / images


def with_times(plan: Plan, measured: Plan) -> Plan:
    """The plan with the seconds per step and the memory of one that was measured."""

    def stage(new: StagePlan | None, old: StagePlan | None) -> StagePlan | None:
        if new is None or old is None:
            return new
        return replace(new, seconds_per_step=old.seconds_per_step, memory_gib=old.memory_gib)

    first, second = stage(plan.first_stage, measured.first_stage), stage(plan.denoiser, measured.denoiser)
    return replace(plan, first_stage=first, denoiser=second)


def _with_steps(
    config: Any, steps: int, prefix: str, fixed: Collection[str], rare: Mapping[str, int] | None = None
) -> Any:
    """New number of steps; intervals, warm-up and averaging keep their proportion to the run unless they are fixed.
    rare: intervals that are not made shorter than this."""
    least = {"validate_every": 1, "sample_every": 1, **(rare or {})}
    ema = config.optimizer.ema_decay
    optimizer = {
        "warmup_steps": min(config.optimizer.warmup_steps, steps // 10),
        "ema_decay": None if ema is None else min(ema, 1 - 1 / max(10.0, steps / 10)),
    }
    loop = {
        "checkpoint_every": max(1, min(config.checkpoint_every, steps // 4)),
        "validate_every": max(least["validate_every"], min(config.validate_every, steps // 10)),
        "sample_every": max(least["sample_every"], min(config.sample_every, steps // 6)),
    }
    optimizer = {k: v for k, v in optimizer.items() if f"{prefix}optimizer.{k}" not in fixed}
    loop = {k: v for k, v in loop.items() if f"{prefix}{k}" not in fixed}
    return replace(config, steps=steps, **loop, optimizer=replace(config.optimizer, **optimizer))


def _with_starts(
    objective: FirstStageTrainConfig, factor: float, prefix: str, fixed: Collection[str]
) -> FirstStageTrainConfig:
    """The discriminator, the whole images and the codes begin at the same share of a longer or shorter run."""
    names = ("discriminator_start", "crop_steps", "quantize_start")
    starts = {name: getattr(objective, name) for name in names}
    moved: dict[str, Any] = {
        k: round(v * factor) for k, v in starts.items() if v is not None and f"{prefix}{k}" not in fixed
    }
    return replace(objective, **moved)


def describe_plan(plan: Plan) -> str:
    """A few lines for people."""
    width, height = plan.image_size
    f = plan.downsampling
    lines = [
        f"plan: {plan.recipe}",
        f"  data        {plan.images} images, {width}x{height}, {plan.image_channels} channel"
        + ("s" if plan.image_channels > 1 else " (grey; --set data.channels=3 keeps colour)"),
        f"  latents     {width // f}x{height // f}x{plan.latent_channels} (f = {f})",
    ]
    if plan.conditioning is not None:
        lines.append(f"  condition   {', '.join(plan.conditioning) or 'none'}")
    for name, stage in (("first stage", plan.first_stage), ("denoiser", plan.denoiser)):
        if stage is None:
            continue
        size = f"{stage.network + ', ' if stage.network else ''}{stage.parameters / 1e6:.2f} M parameters"
        text = f"  {name:<12}{size}, {stage.steps} steps of {stage.images_per_step} images"
        if stage.seconds is not None and stage.memory_gib is not None:
            text += f", about {duration(stage.seconds)} ({stage.seconds / 3600:.2f} h), {stage.memory_gib:.1f} GiB"
        lines.append(text)
    return "\n".join(lines)
