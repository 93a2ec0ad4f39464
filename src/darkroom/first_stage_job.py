"""The first stage of `darkroom train`: train one, or take one; its latents are measured.

build or load -> train -> measure latents -> fit the grain of the image -> part `first_stage` of the run
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from darkroom.build import build_first_stage, pixel_first_stage, with_grain
from darkroom.config import to_dict
from darkroom.data.io import image_grid, write_image
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.grain import fit_output_grain
from darkroom.latent_diffusion import to_uint8
from darkroom.model_io import load, load_first_stage, save
from darkroom.training.first_stage_step import FirstStageStep, quieten_posterior
from darkroom.training.loop import Hooks, LoopResult, finished_result

if TYPE_CHECKING:
    from darkroom.train_job import Job

GRAIN_IMAGES = 1024  # whose missing roughness gives the grain on a decoder's image


def first_stage_stage(job: Job, resume: bool) -> tuple[FirstStage, LoopResult | None]:
    """The trained or given first stage, with measured latents; the identity for pixel models."""
    choice = job.recipe.first_stage
    if choice.train is None:
        place = choice.name or choice.path
        if place is None:  # on pixels
            first_stage = pixel_first_stage(job.recipe.data.channels, job.data.pixels)
            return first_stage.to(job.device).eval(), None
        return load_first_stage(place, job.device), None
    done = job.folder / "first_stage"
    if resume and (done / "darkroom.json").is_file():
        loaded = load(done, device=str(job.device))
        assert isinstance(loaded, FirstStage)
        # The layout that it had in training: the rest of a half-made latent cache is then equal to the last bit.
        loaded.autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return loaded, finished_result(job.folder, "first_stage")
    config = choice.train
    torch.manual_seed(config.seed)
    if config.init_from is not None:
        first_stage = load_first_stage(config.init_from, job.device)
        first_stage = with_grain(first_stage, config.add_grain).requires_grad_(True)
    else:
        first_stage = build_first_stage(to_dict(config.autoencoder) | {"pixels": to_dict(job.data.pixels)})
        quieten_posterior(first_stage.trainable, config.objective.initial_posterior_std)
    step = FirstStageStep(first_stage.trainable, config.objective)
    batches = job.validation_batches(job.validation if len(job.validation) else job.data)
    shown = torch.cat([b["image"] for b in batches])[:8]

    def validate(_: int) -> dict[str, float]:
        return step.validation_loss(batches, config.seed)

    def sample(train_step: int) -> None:
        if job.world.is_main:
            decoded = first_stage.autoencoder.decode(first_stage.autoencoder.encode(shown.to(job.device)).mode())
            error = (decoded.float().cpu() - shown).abs() * 2 - 1
            rows = torch.cat([shown, decoded.float().cpu(), error])
            path = job.folder / "samples" / f"first_stage-{train_step:06d}.png"
            write_image(image_grid(to_uint8(rows), columns=shown.shape[0]), path)

    with contextlib.closing(job.batches(job.data, config)) as source:
        trainer = job.trainer("first_stage", step, source, config, Hooks(validate, sample))
        result = trainer.run(resume)
    if result.interrupted:
        return first_stage, result
    if trainer.ema is not None:
        trainer.ema.swap()  # the averaged weights are the first stage from here on
    first_stage.to(job.device).eval()
    first_stage.__dict__.pop("reference", None)  # it is no longer the bundled one that it may have begun as
    first_stage.kept = None  # nor does the discriminator of the file fit that it may have begun as
    if config.objective.train_encoder:
        first_stage.preview = None  # of other latents
    if config.objective.train_encoder or config.init_from is None:
        job.say("measuring the latents")
        first_stage.measure(job.measured_batches(job.data), config.latents)
    if first_stage.trainable.decoder.grain is not None:
        job.say("measuring the grain that the decoder's images lack")
        images = (batch["image"] for batch in job.measured_batches(job.data, GRAIN_IMAGES, 16))
        fit_output_grain(first_stage.trainable, images, config.grain_share)
    result.last.update(validate(result.steps))
    if job.world.is_main:
        save(first_stage, done)
    return first_stage, result
