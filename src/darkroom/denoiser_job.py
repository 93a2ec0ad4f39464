"""The second stage of `darkroom train`: the denoiser and its conditioner, on the latents of a first stage.

latent cache -> network and conditioner, new or those of `init_from` -> train, with sample grids and scores -> model
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from darkroom.build import build_conditioner, build_denoiser, conditioner_config, denoiser_config
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.requests import encoders_of
from darkroom.data.io import image_grid, write_png
from darkroom.data.latent_cache import LatentCache
from darkroom.denoiser import Denoiser
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.first_stage.statistics import encoder_fingerprint
from darkroom.generation_request import Request
from darkroom.interop.text_towers import fill as fill_text_towers
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load
from darkroom.safe_files import write_json
from darkroom.score_hook import ScoreHook
from darkroom.training.checkpoint import latest_checkpoint
from darkroom.training.denoiser_step import DenoiserStep
from darkroom.training.loop import Hooks, LoopResult
from darkroom.training.progress import Progress

if TYPE_CHECKING:
    from darkroom.train_job import Job


def denoiser_stage(
    job: Job, first_stage: FirstStage, resume: bool
) -> tuple[LatentDiffusion, LoopResult, dict[str, dict[str, Tensor]] | None]:
    """The trained model (averaged weights), how training went, and the live weights."""
    recipe = job.recipe
    torch.manual_seed(recipe.seed)
    denoiser, conditioner = new_denoiser(job, first_stage)
    step = DenoiserStep(denoiser, conditioner, first_stage, recipe.objective)
    dataset, validation = cached_latents(job, first_stage, conditioner.fields)
    if recipe.first_stage.latents is not None:  # the cache holds what was before them
        first_stage.measure(job.measured_batches(dataset), recipe.first_stage.latents)
    batches = job.validation_batches(validation)
    model = LatentDiffusion(first_stage, denoiser, conditioner, job.model_info({}))
    for module in (denoiser, conditioner):
        module.to(job.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    request = model.validate(sample_request(job, model))  # what is wrong with it is found now

    def validate(_: int) -> dict[str, float]:
        return step.validation_loss(batches, recipe.seed) if batches else {}

    def sample(train_step: int) -> None:
        if job.world.is_main:
            try:
                images = model.generate(request).images
            except DarkroomError as error:  # not finite: the training may recover, or stops by its own rule
                return job.say(f"warning: no samples at step {train_step}: {error}")
            path = job.folder / "samples" / f"denoiser-{train_step:06d}.png"
            names = job.data.class_names or []
            captions = request.prompts or [names[int(label)] for label in request.class_labels or []]
            write_png(path, image_grid(images, pixels=model.pixels), {"captions": json.dumps(captions)})

    scorer = None
    if recipe.evaluate.scores is not None:
        scorer = ScoreHook(recipe, job.folder, model, job.validation, job.world, job.say)
    with contextlib.closing(job.batches(dataset, recipe)) as source:
        trainer = job.trainer("denoiser", step, source, recipe, Hooks(validate, sample, scorer))
        try:
            result = trainer.run(resume)
        finally:
            if scorer is not None:
                scorer.close()
    live = None
    if trainer.ema is not None and not result.interrupted:
        live = {name: _clone_state(module) for name, module in step.modules.items()}
        trainer.ema.swap()
    model.eval()
    return model, result, live


def new_denoiser(job: Job, first_stage: FirstStage) -> tuple[Denoiser, Conditioner]:
    recipe = job.recipe
    kept = job.folder / "conditioner.json"  # the tokenizer and class names of this run
    begun = kept.is_file() and latest_checkpoint(job.folder / "checkpoints" / "denoiser") is not None
    if recipe.init_from is not None and not begun:
        model = load(recipe.init_from, device="cpu")
        assert isinstance(model, LatentDiffusion)
        model.denoiser.requires_grad_(True)
        for encoder in model.conditioner.encoders.values():
            encoder.unfreeze()  # type: ignore[operator]
        check_classes(job, model.conditioner)
        if job.world.is_main:
            write_json(kept, model.conditioner.config_dict)
        return model.denoiser, model.conditioner
    if kept.is_file():
        config = json.loads(kept.read_text())
    else:
        config = conditioner_config(recipe.conditioner, job.data)
        if job.world.is_main:
            write_json(kept, config)
    conditioner = build_conditioner(config, first_stage)
    for line in [] if begun else fill_text_towers(conditioner):
        job.say(line)
    for encoder in conditioner.encoders.values():
        encoder.ready()  # type: ignore[operator]
    return build_denoiser(denoiser_config(recipe.denoiser, {}, first_stage.latent_channels, conditioner)), conditioner


def check_classes(job: Job, conditioner: Conditioner) -> None:
    for name, encoder in conditioner.encoders.items():
        config: Any = getattr(encoder, "config", None)
        classes = getattr(config, "classes", None)
        # Each kind of condition asks the data for its own names: of classes, boxes or label maps.
        if classes and list(classes) != list(replace(config, classes=[]).completed(name, job.data).classes):
            raise DarkroomError(
                f"--init-from {job.recipe.init_from}: its classes ({', '.join(classes[:4])}, ...) are not "
                "the data's; name the class folders alike, or train without --init-from"
            )


def cached_latents(job: Job, first_stage: FirstStage, wanted: Collection[str]) -> tuple[Any, Any]:
    """The two splits as cached posterior moments and the wanted fields; the images themselves for pixel models."""
    if isinstance(first_stage.autoencoder, IdentityAutoencoder):
        return job.data, job.validation
    autoencoder = first_stage.autoencoder.eval()

    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(images.to(job.device)).moments

    job.say("encoding the images to latents")
    encoder = encoder_fingerprint(autoencoder)
    caches = []
    for split, images in (("train", job.data), ("validation", job.validation)):
        started = time.perf_counter()
        with Progress(f"encoding {split}", len(images), quiet=job.quiet or not job.world.is_main) as bar:

            def report(done: int, _: int, bar: Progress = bar, started: float = started) -> None:
                bar.update(done, done / max(time.perf_counter() - started, 1e-9))

            place = job.folder / "latents" / split
            caches.append(
                LatentCache.build(
                    images, encode, place, autoencoder=encoder, wanted=wanted, progress=report, say=job.say
                )
            )
    return caches[0], caches[1]


def sample_request(job: Job, model: LatentDiffusion) -> Request:
    """The fixed request of the sample grids: prompts or classes of the recipe or the validation split."""
    evaluate, conditioner = job.recipe.evaluate, model.conditioner
    count = evaluate.samples
    prompts: list[str] | None = None
    labels: list[str | int] | None = None
    if "text" in conditioner.fields:
        captions = list(evaluate.prompts or job.validation.captions() or job.data.captions() or [""])
        prompts = [captions[i * len(captions) // count % len(captions)] for i in range(count)]
    elif "class_label" in conditioner.fields:
        classes = len(job.data.class_names or [0])
        labels = [i % classes for i in range(count)]
    conditions = sample_conditions(job, conditioner, count)
    return Request(prompts=prompts, class_labels=labels, seeds=list(range(count)), conditions=conditions)


def sample_conditions(job: Job, conditioner: Conditioner, count: int) -> dict[str, Any] | None:
    """Boxes, maps and pictures of the examples whose captions are the prompts. With the recipe's own prompts only
    those that the network cannot do without."""
    wanted = {
        field
        for encoder in encoders_of(conditioner)
        if encoder.stays or job.recipe.evaluate.prompts is None
        for field in encoder.fields
    } - {"text", "class_label"}
    if not wanted:
        return None
    source = job.validation if len(job.validation) else job.data
    examples = [source[i * len(source) // count] for i in range(count)]
    return {field: [example[field] for example in examples] for field in sorted(wanted)}


def _clone_state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}
