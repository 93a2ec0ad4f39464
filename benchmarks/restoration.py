"""What upscaling_table.py scores and times: pictures restored by a function, images of a model, and both with the
difference that is left to the small picture. No benchmark by itself.

Shapes: B batch, C channels, H W image size, h w small picture.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darkroom.data.batches import collate
from darkroom.data.degradations import LowResolution
from darkroom.data.derived import DerivedDataset
from darkroom.data.latent_cache import module_hash
from darkroom.data.resizing import bicubic
from darkroom.data.sources import ImageDataset
from darkroom.evaluation.checks import pair_check
from darkroom.evaluation.extractors import default_extractors
from darkroom.evaluation.feature_files import Pictures, Values
from darkroom.evaluation.picture_sources import Check, Example, GeneratedPictures, StoredPictures, eight_bits
from darkroom.evaluation.protocol import Extraction
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.objective import ObjectiveConfig
from darkroom.pixel_format import PixelFormat
from darkroom.scoring import EvalRequest, Evaluation
from darkroom.training.denoiser_step import DenoiserStep
from darkroom.training.distributed import World
from darkroom.training.optim import OptimizerConfig, make_optimizer
from darkroom.upscaling.consistency import consistent, smaller

CONSISTENCY = "consistency"
EIGHT_BITS = PixelFormat()
Restore = Callable[[Tensor], Tensor]  # small (B, 3, h, w) in [-1, 1] -> image (B, 3, H, W), about [-1, 1]


def is_plain(rule: LowResolution | None) -> bool:
    """Whether small pictures are the images made smaller and nothing else."""
    return rule is not None and rule.pipeline == "bicubic" and rule.factor > 1 and rule.blur_range == (0, 0)


def bicubic_by(factor: int) -> Restore:
    return lambda small: bicubic(small, (small.shape[2] * factor, small.shape[3] * factor))


def consistency_check(images: Tensor, examples: Sequence[Example]) -> Values:
    """Root mean square difference between the small picture and the image made smaller, in levels of 255."""
    found = []
    for image, example in zip(images, examples, strict=True):
        small = example["low_resolution"].float()
        again = smaller(image.permute(2, 0, 1).float(), (small.shape[1], small.shape[2])).round()
        found.append((again - small).square().mean().sqrt())
    return {CONSISTENCY: torch.stack(found)}


class Restored(StoredPictures):
    """The small pictures of examples through a function."""

    def __init__(self, dataset: ImageDataset, numbers: Sequence[int], restore: Restore) -> None:
        super().__init__(dataset, numbers)
        self.restore = restore
        self.checks: list[Check] = []

    def read(self, numbers: Sequence[int]) -> Pictures:
        examples = [self.dataset[self.numbers[n]] for n in numbers]
        small = EIGHT_BITS.to_network(torch.stack([e["low_resolution"] for e in examples]))
        images = EIGHT_BITS.from_network(self.restore(small)).permute(0, 2, 3, 1).contiguous()
        return checked(images, examples, self.checks)


class Consistent(GeneratedPictures):
    """A model's images, made consistent with their small pictures."""

    def read(self, numbers: Sequence[int]) -> Pictures:
        checks, self.checks = self.checks, []
        try:
            made = super().read(numbers)
        finally:
            self.checks = checks
        examples = [self.example(n) for n in numbers]
        images = torch.stack(
            [
                consistent(image.permute(2, 0, 1).float(), e["low_resolution"].float(), 0, 255)[0].permute(1, 2, 0)
                for image, e in zip(made.images, examples, strict=True)
            ]
        ).to(torch.uint8)
        found = checked(images, examples, self.checks)
        return Pictures(images, {**made.values, **found.values}, made.conditions)


def checked(images: Tensor, examples: Sequence[Example], checks: Sequence[Check]) -> Pictures:
    values: Values = {}
    for check in checks:
        values |= check(images, examples)
    return Pictures(images, values)


class RestorationEvaluation(Evaluation):
    """`darkroom eval` of a source of pictures that is given, against those that the small ones were made of.

    maker: the network behind pictures that are no model's, None for a formula; its digest is part of the settings.
    """

    def __init__(
        self,
        request: EvalRequest,
        name: str,
        folder: Any,
        model: LatentDiffusion | None,
        dataset: DerivedDataset,
        source: Restored | GeneratedPictures,
        maker: nn.Module | None = None,
    ) -> None:
        distance, _ = default_extractors(torch.device("cpu"))
        source.checks = [pair_check(dataset, distance)]
        if is_plain(dataset.config.low_resolution):  # else pictures made smaller say nothing of the damage
            source.checks.append(consistency_check)
        self._given, self._maker, self._made = source, maker, dataset.made
        super().__init__(request, name, folder, World(), None, model, dataset)
        self.networks[distance.name] = Extraction(distance.name, distance.weights, "none")

    def _samples(self, size: tuple[int, int]) -> Any:
        return self._given

    def possible(self) -> dict[str, bool]:
        return super().possible() | {"pairs": True}  # every row has its checks, a formula's too

    @cached_property
    def settings(self) -> dict[str, Any]:
        made = "formula" if self._maker is None else module_hash(self._maker)
        own = {"restored by": made, "corrected": isinstance(self._given, Consistent), "small pictures": self._made}
        return super().settings | own


def tile(image: Tensor) -> np.ndarray:
    """(3, H, W) of numbers up to 255 -> uint8 (H, W, 3)."""
    return eight_bits([image.round().to(torch.uint8).permute(1, 2, 0).numpy()], EIGHT_BITS)[0].numpy()


# --- speed ------------------------------------------------------------------------------------------------------------


def speeds(
    models: Mapping[str, LatentDiffusion], examples: Sequence[Example], steps: int | None, rounds: int = 5
) -> dict[str, tuple[float, float]]:
    """By name, (training, sampling) samples per second of processor time: the best of rounds in which all take turns,
    so that they meet the same load."""
    tasks: dict[tuple[str, str], Callable[[], None]] = {}
    for name, model in models.items():
        tasks[name, "train"] = training_task(model, examples)
        tasks[name, "sample"] = sampling_task(model, examples, steps)
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(rounds):
        for key, task in tasks.items():
            started = time.process_time()
            task()
            best[key] = min(best[key], time.process_time() - started)
    count = len(examples)
    return {name: (count / best[name, "train"], count / best[name, "sample"]) for name in models}


def sampling_task(model: LatentDiffusion, examples: Sequence[Example], steps: int | None) -> Callable[[], None]:
    batch = collate(examples, EIGHT_BITS)
    given: dict[str, Any] = {field: list(batch[field]) for field in model.conditioner.fields}
    height, width = examples[0]["image"].shape[1:]

    def task() -> None:
        model.generate(
            seed=list(range(len(examples))), size=(width, height), steps=steps, batch_size=len(examples), **given
        )

    return task


def training_task(model: LatentDiffusion, examples: Sequence[Example]) -> Callable[[], None]:
    """One step of a copy of the denoiser, latents from a cache (of a model on pixels: from the images); what is encoded
    for a condition is encoded in every step, as in training."""
    model = copy.deepcopy(model)
    batch = collate(examples, EIGHT_BITS)
    stage = model.first_stage
    if stage is not None and not isinstance(stage.autoencoder, IdentityAutoencoder):
        with torch.no_grad():
            batch["moments"] = stage.autoencoder.encode(batch["image"]).moments
    model.denoiser.train().requires_grad_(True)
    phase = DenoiserStep(model.denoiser, model.conditioner, stage, ObjectiveConfig()).phases[0]
    optimizer = make_optimizer(phase.parameters, OptimizerConfig())
    generator = torch.Generator().manual_seed(0)

    def task() -> None:
        loss, _ = phase.module(batch, generator, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return task
