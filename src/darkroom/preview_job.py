"""Training a preview decoder: the stage that `darkroom train` runs for a recipe with a `preview` section.

latents of the images (cached or on the way) -> distil -> compare with the full decoder -> part `preview` of the model
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkroom.build import build_preview
from darkroom.config import to_dict
from darkroom.data.batches import pixels_of
from darkroom.data.io import image_grid, write_image
from darkroom.data.latent_cache import LatentCache
from darkroom.data.sources import ImageDataset
from darkroom.denoiser_job import cached_latents
from darkroom.errors import DarkroomError
from darkroom.features.psnr import psnr
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.preview import PreviewDecoder, fitted
from darkroom.latent_diffusion import to_uint8
from darkroom.model_io import install_preview
from darkroom.training.loop import Hooks, LoopResult
from darkroom.training.preview_step import PreviewRecipe, PreviewStep, batch_posterior

if TYPE_CHECKING:
    from darkroom.train_job import Job

STAGE = "preview"
SHOWN = 8
TIMED = 15  # decodes of each kind


class LatentsAndImages:
    """Examples of `moments` from a latent cache together with the `image` that they are of."""

    fields = ("moments", "image")

    def __init__(self, cache: LatentCache, images: ImageDataset) -> None:
        self.cache, self.images, self.config = cache, images, images.config
        self.pixels = pixels_of(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(index)

    def example(self, index: int, flip: bool = False) -> dict[str, Any]:
        moments = self.cache.example(index, flip)["moments"]
        return {"moments": moments, "image": self.images.example(index, flip)["image"]}


def new_preview(config: PreviewRecipe, first_stage: FirstStage) -> PreviewDecoder:
    """An untrained preview decoder for the latents of this first stage."""
    f, e, c = first_stage.downsampling, first_stage.latent_channels, first_stage.image_channels
    shape = fitted(config.network, latent_channels=e, image_channels=c, downsampling=f)
    return build_preview(to_dict(shape), first_stage.shift, first_stage.scale)


def preview_stage(job: Job, first_stage: FirstStage, resume: bool) -> tuple[LoopResult, dict[str, float]]:
    """Train a preview decoder and attach it to the first stage; gives how training went and what it reached."""
    config = job.recipe.preview
    assert config is not None
    if config.cache and job.recipe.data.random_crop is not None:
        raise DarkroomError(
            "a preview decoder cannot learn from cached latents of random crops: set preview.cache=false"
        )
    torch.manual_seed(config.seed)
    preview = new_preview(config, first_stage)
    step = PreviewStep(preview, first_stage, config.objective)
    train, validation = job.data, job.validation if len(job.validation) else job.data
    dataset: Any = train
    if config.cache:
        cache, _ = cached_latents(job, first_stage, ())
        dataset = LatentsAndImages(cache, train)
    batches = with_moments(job.validation_batches(validation), first_stage)
    images = torch.cat([b["image"] for b in batches])[:SHOWN]
    with torch.no_grad():
        latents = torch.cat([batch_posterior(b, first_stage).mode() for b in batches])[:SHOWN]
        full = first_stage.decode(latents).float().cpu()

    def validate(_: int) -> dict[str, float]:
        return step.validation_loss(batches)

    def sample(train_step: int) -> None:
        if job.world.is_main:
            rows = torch.cat([images, full, preview(latents).float().cpu()])
            path = job.folder / "samples" / f"preview-{train_step:06d}.png"
            write_image(image_grid(to_uint8(rows), columns=len(images)), path)

    with contextlib.closing(job.batches(dataset, config)) as source:
        trainer = job.trainer(STAGE, step, source, config, Hooks(validate, sample))
        result = trainer.run(resume)
    if result.interrupted:
        return result, {}
    if trainer.ema is not None:
        trainer.ema.swap()
    for parameter in preview.parameters():
        parameter.data = parameter.data.half().float()  # as it will be loaded
    first_stage.preview = preview
    reached = compare(first_stage, batches)
    result.last.update(validate(result.steps))
    job.say(
        f"preview decoder: {reached['parameters']:,.0f} parameters, {reached['decibels_lost']:.2f} dB below the full "
        f"decoder, {reached['times_faster']:.1f} times as fast"
    )
    place = job.recipe.first_stage.name or job.recipe.first_stage.path
    if config.install and place is not None and job.world.is_main:
        job.say(f"installed in {install_preview(preview, place)}")
    return result, reached


def with_moments(batches: list[dict[str, Any]], first_stage: FirstStage) -> list[dict[str, Any]]:
    """Batches with the cached moments of their images, so that each validation does not encode them again."""
    with torch.no_grad():
        return [
            {"image": b["image"], "moments": first_stage.autoencoder.encode(b["image"].to(first_stage.device)).moments}
            for b in batches
        ]


@torch.no_grad()
def compare(first_stage: FirstStage, batches: list[dict[str, Any]]) -> dict[str, float]:
    """The preview decoder against the full one on the same latents: mean PSNR against the images, the difference,
    PSNR of one against the other, and how many times as fast it is for one image."""
    assert first_stage.preview is not None
    own: list[Tensor] = []
    full: list[Tensor] = []
    between: list[Tensor] = []
    for batch in batches:
        image = batch["image"].to(first_stage.device)
        latent = batch_posterior(batch, first_stage).mode()
        one, other = (d(latent).float().clamp(-1, 1) for d in (first_stage.preview_of, first_stage.decode))
        own.append(psnr(one, image))
        full.append(psnr(other, image))
        between.append(psnr(one, other))
    psnr_preview, psnr_full, psnr_between = (float(torch.cat(v).mean()) for v in (own, full, between))
    seconds = time_decoders(first_stage, latent[:1])
    return {
        "parameters": float(sum(p.numel() for p in first_stage.preview.parameters())),
        "psnr": psnr_preview,
        "psnr_full_decoder": psnr_full,
        "decibels_lost": psnr_full - psnr_preview,
        "psnr_to_full_decoder": psnr_between,
        "milliseconds": 1000 * seconds["preview"],
        "milliseconds_full_decoder": 1000 * seconds["full"],
        "times_faster": seconds["full"] / seconds["preview"],
    }


@torch.no_grad()
def time_decoders(first_stage: FirstStage, latent: Tensor, rounds: int = TIMED) -> dict[str, float]:
    """Median seconds of decoding `latent` with either decoder, interleaved so that a busy machine slows both alike."""
    decoders: dict[str, Callable[[Tensor], Tensor]] = {"preview": first_stage.preview_of, "full": first_stage.decode}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(rounds + 1):
        for name, decode in decoders.items():
            started = time.perf_counter()
            decode(latent)
            if latent.device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def with_derived_sizes(config: PreviewRecipe, first_stage: FirstStage) -> PreviewRecipe:
    """The recipe's section with what follows from the first stage, so that the saved config tells what was built."""
    f, e, c = first_stage.downsampling, first_stage.latent_channels, first_stage.image_channels
    return replace(config, network=fitted(config.network, e, c, f))
