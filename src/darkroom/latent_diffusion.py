"""`LatentDiffusion`: first stage, denoiser and conditioner together. The only place where all three meet.

Shapes: B batch, C latent channels, H W latent size; images are (B, height, width, channels) at this edge, in the
model's pixel type.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darkroom.classifier_guidance import ClassifierGuide, ClassifierGuided
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.requests import (
    collate_values,
    encoder_of,
    encoders_of,
    named_encoders,
    record_conditions,
)
from darkroom.conditioning.tokens import plain_texts
from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.grids import Grid, make_grid
from darkroom.diffusion.noise import SeededNoise
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.generation_request import DEFAULTS, Request, Result, check_guide, check_start, validated
from darkroom.guidance import Guide, Guided
from darkroom.inpaint import Start, begin
from darkroom.pixel_format import PixelFormat
from darkroom.solvers import SOLVERS, default_spacing
from darkroom.solvers.common import Denoise, Noise

CONDITION_STREAM = 0x5EED_C0DE  # of the noise that is added to a condition, by exclusive or with an image's seed


def to_pixels(image: Tensor, pixels: PixelFormat) -> np.ndarray:
    """(B, C, height, width) in [-1, 1] -> (B, height, width, C) in the type and range of the format."""
    return pixels.from_network(image).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_uint8(image: Tensor) -> np.ndarray:
    """(B, C, height, width) in [-1, 1] -> (B, height, width, C) uint8, rounded to the nearest value."""
    return to_pixels(image, PixelFormat())


@dataclass(frozen=True)
class Guides:
    """Other networks that take part in a generation."""

    model: LatentDiffusion | None = None
    classifier: ClassifierGuide | None = None


class LatentDiffusion(nn.Module):
    """A model that generates. `first_stage` is None for a denoiser-only file (or pixel diffusion)."""

    def __init__(
        self,
        first_stage: FirstStage | None,
        denoiser: Denoiser,
        conditioner: Conditioner,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.first_stage, self.denoiser, self.conditioner = first_stage, denoiser, conditioner
        self.info = dict(info or {})
        self.adapters: Any = None  # what `darkroom.adapters` applied, and how to undo it
        # What the official file that it came from held besides, for its export: `Kept` of interop/kept_tensors.py.
        self.kept: Any = None
        self.eval()

    @property
    def defaults(self) -> dict[str, Any]:
        """Steps, guidance scale, solver, batch size and size used when a request leaves them out."""
        return DEFAULTS | {"size": (64, 64)} | (self.info.get("defaults") or {})

    @property
    def pixels(self) -> PixelFormat:
        """What the numbers of its images mean: the first stage knows; 8 bits where there is none."""
        return PixelFormat() if self.first_stage is None else self.first_stage.pixels

    @property
    def image_channels(self) -> int:
        return self.latent_channels if self.first_stage is None else self.first_stage.image_channels

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    # --- generate -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[Any] | Tensor | Request | None = None,
        *,
        class_label: str | int | Sequence[str | int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        eta: float | None = None,
        size: tuple[int, int] | None = None,
        negative_prompt: Any = None,
        batch_size: int | None = None,
        noise_level: int | None = None,
        guidance: Mapping[str, float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        guide: LatentDiffusion | None = None,
        classifier: ClassifierGuide | None = None,
        start: Start | None = None,
        progress: Callable[[int, int], None] | None = None,
        preview: Callable[[int, np.ndarray], None] | None = None,
        preview_every: int = 1,
        **conditions: Any,
    ) -> Result:
        """Images from prompts, class labels, other conditions, or nothing (an unconditional model).

        A prompt may be token ids, for models whose vocabulary is not at hand; see `docs/text.md`.
        `conditions`: what else the model takes, by field: boxes=[("fox", 0.1, 0.2, 0.5, 0.9)], segmentation=an array of
        class ids, low_resolution=a picture, image= and repaint_mask=, depth=, ... A list has one entry per image.
        `guide` is a weaker model, `classifier` recognises classes in noisy latents; see docs/guidance.md.
        `start` is what an edit begins with; `darkroom.edit` makes it of a picture of any size.

        Image k depends on its own seed, prompt and settings; the batch it is computed in changes at most the last
        rounding. `progress(done, total)` is called after every solver step. `preview(done, images)` is given what the
        images of the current batch look like so far, (B, height, width, channels) in the model's pixel type, every
        `preview_every` steps; it needs a preview decoder. Neither changes the result. Raises DarkroomError for bad
        requests.
        """
        if isinstance(prompt, Request):
            request = prompt
        else:
            request = Request(
                prompts=plain_texts(prompt),
                class_labels=_as_list(class_label),
                seeds=[seed] if isinstance(seed, int) else list(seed),
                steps=steps,
                guidance_scale=guidance_scale,
                solver=solver,
                eta=eta,
                size=size,
                negative_prompt=negative_prompt,
                batch_size=batch_size,
                conditions=conditions or None,
                noise_level=noise_level,
                guidance=None if guidance is None else dict(guidance),
                guidance_interval=guidance_interval,
                guidance_rescale=guidance_rescale,
            )
        if preview is not None and preview_every < 1:
            raise DarkroomError(f"preview_every is {preview_every}: it must be at least 1")
        show = None if preview is None else self._shower(preview, preview_every)
        request = self.validate(request)
        if guide is not None:
            check_guide(self, guide)
        if start is not None:
            check_start(self, start, request)
        return self._run(request, Guides(guide, classifier), start, progress, show)

    def validate(self, request: Request) -> Request:
        """The request with every default filled in and lists of equal length, or a DarkroomError that says the cure."""
        return validated(self, request)

    @property
    def _network_config(self) -> Any:
        return self.denoiser.network.config

    @property
    def size_multiple(self) -> int:
        """Sides of latents are multiples of this: so often the network halves them."""
        return int(self._network_config.size_multiple)

    @property
    def downsampling(self) -> int:
        return 1 if self.first_stage is None else self.first_stage.downsampling

    @property
    def latent_channels(self) -> int:
        return int(self._network_config.out_channels) // (2 if self.denoiser.learned_variance else 1)

    @torch.no_grad()
    def _run(
        self,
        request: Request,
        guides: Guides,
        start: Start | None,
        progress: Callable[[int, int], None] | None,
        show: Callable[[int, Tensor], None] | None,
    ) -> Result:
        assert request.batch_size and request.steps
        images, latents, nfe = [], [], 0
        batches = range(0, len(request.seeds), request.batch_size)
        steps = request.steps if start is None else start.steps(request.steps)
        for done, first in enumerate(batches):
            part = slice(first, first + request.batch_size)
            on_step = _on_step(progress, show, done * steps, len(batches) * steps)
            latent, nfe = self._sample(request, part, guides, start, on_step)
            image = self.decode(latent)
            finite = image.flatten(1).isfinite().all(1).tolist()
            if not all(finite):
                raise DarkroomError(
                    f"the image of seed {request.seeds[part][finite.index(False)]} is not finite; use a lower "
                    "guidance scale or more steps, float32 weights, or another checkpoint of the model"
                )
            latents.append(latent)
            images.append(to_pixels(image, self.pixels))
        return Result(np.concatenate(images), torch.cat(latents), nfe, self.settings(request, nfe, guides))

    def _shower(self, preview: Callable[[int, np.ndarray], None], every: int) -> Callable[[int, Tensor], None]:
        """Turns estimates x0 (B, C, H, W) into calls of `preview`; complains now if there is no preview decoder."""
        first_stage = self.first_stage
        if first_stage is None or first_stage.downsampling == 1:
            decode = self.decode
        elif first_stage.preview is None:
            raise DarkroomError(
                "this model has no preview decoder: make one with "
                "`darkroom train preview --first-stage MODEL --set preview.install=true`"
            )
        else:
            decode = first_stage.preview_of

        def show(done: int, x0: Tensor) -> None:
            if done % every == 0:
                preview(done, to_pixels(decode(x0), self.pixels))

        return show

    def _sample(
        self,
        request: Request,
        part: slice,
        guides: Guides,
        start: Start | None,
        on_step: Callable[[int, Tensor], None] | None,
    ) -> tuple[Tensor, int]:
        """(B, C, H, W) latents of the images `part` of the request, and network calls per image."""
        assert request.size and request.steps and request.solver and request.guidance_scale is not None
        seeds = request.seeds[part]
        shape = (self.latent_channels, request.size[1] // self.downsampling, request.size[0] // self.downsampling)
        noise = SeededNoise(seeds, shape, self.device)
        denoise: Guided | ClassifierGuided = self.guided(request, part, guides.model)
        if (c := guides.classifier) is not None:
            denoise = ClassifierGuided(denoise, c.classifier, c.labels_of(len(request.seeds))[part], c.scale)
        own = None if start is None else start.part(part)
        return self.solve(request, denoise, noise, shape[1] * shape[2], on_step, own), denoise.nfe

    def solve(
        self,
        request: Request,
        denoise: Denoise,
        noise: Noise,
        places: int,
        on_step: Callable[[int, Tensor], None] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """From noise to latents (B, C, H, W) by the solver of a validated request.

        noise(0) is what it begins with, of an edit together with the pictures of `start`. places: h*w of what the
        network sees at a time, see `shift_rule`.
        """
        assert request.steps and request.solver
        grid = self.grid(request.solver, request.steps, places)
        options: dict[str, Any] = {} if request.eta is None else {"eta": request.eta}
        if request.solver == "ddpm" and self.denoiser.learned_variance and hasattr(denoise, "predict"):
            options["variance"] = "learned"
        if on_step is not None:
            options["callback"] = lambda step, level, x, x0: on_step(step + 1, x0)
        prior_std = self.denoiser.schedule.prior_std(grid[0])
        x = noise(0) * prior_std
        if start is not None:
            known = self.encode_image(start.image)
            denoise, x, grid = begin(denoise, start, known, noise(0), grid, prior_std, self.downsampling)
        return SOLVERS[request.solver](denoise, x, grid, lambda i: noise(i + 1), **options)

    def guided(self, request: Request, part: slice, guide: LatentDiffusion | None = None) -> Guided:
        """The denoiser with the conditions of some images bound to it, and guidance."""
        assert request.guidance_scale is not None
        options: dict[str, Any] = {"interval": request.guidance_interval, "rescale": request.guidance_rescale}
        full = self.encode_condition(request, part)
        if guide is not None:
            weaker = Guide(guide.denoiser, guide.encode_condition(request, part))
            return Guided(self.denoiser, full, scale=request.guidance_scale, guide=weaker, **options)
        scales = self._scales(request)
        names = list(scales)
        # A chain is only encoded where scales differ: equal ones are one step.
        own = len(set(scales.values())) > 1
        between = [
            (self._partly(request, part, names[: k + 1]), scales[name]) for k, name in enumerate(names[:-1]) if own
        ]
        scale = scales[names[-1]] if names else request.guidance_scale
        return Guided(self.denoiser, full, self.encode_negative(request, part), scale, between=between, **options)

    def _scales(self, request: Request) -> dict[str, float]:
        """The guidance scale of each condition that is given and that guidance is about, in the conditioner's order: of
        the request by name, of the encoder's own config, or that of the request for all."""
        assert request.guidance_scale is not None
        given = self._batch(request, slice(0, 1))
        result = {}
        for name, encoder in named_encoders(self.conditioner):
            if encoder.stays or any(given[field] is None for field in encoder.fields):
                continue
            own = (request.guidance or {}).get(name, encoder.guidance_scale)
            result[name] = request.guidance_scale if own is None else own
        return result

    def grid(self, solver: str, steps: int, places: int | None = None) -> Grid:
        """The inference levels of a solver on this model's schedule; places: h*w of the latents, see `shift_rule`."""
        schedule = self.denoiser.schedule
        return make_grid(schedule, steps, spacing=default_spacing(solver, schedule), places=places)

    def encode_condition(self, request: Request, part: slice) -> Conditioning:
        """The conditioning of some images of a validated request; what is not given is null."""
        return self._encode(self._batch(request, part), request, part)

    def encode_negative(self, request: Request, part: slice) -> Conditioning | None:
        """What guidance pushes away from: the negative prompt, else the null conditioning; None where there is no
        guidance (a model without conditions, or scale 1, which a model without null conditioning needs). Conditions
        that stay on both sides of guidance are as asked for."""
        if not self.conditioner.fields or all(
            s == 1 for s in self._scales(request).values() or [request.guidance_scale]
        ):
            return None
        return self._partly(request, part, ())

    def _partly(self, request: Request, part: slice, present: Collection[str]) -> Conditioning:
        """The conditioning with only the encoders `present`, and those that stay; the others are null, or the negative
        prompt."""
        batch = self._batch(request, part)
        absent = [name for name, e in named_encoders(self.conditioner) if name not in present and not e.stays]
        if request.negative_prompt and "text" not in {self.conditioner.encoders[name].field for name in present}:
            batch["text"] = [request.negative_prompt] * len(request.seeds[part])
            absent = [name for name in absent if self.conditioner.encoders[name].field != "text"]
        return self._encode(batch, request, part, absent)

    def _batch(self, request: Request, part: slice) -> dict[str, Any]:
        """Every field of the conditioner for some images; None where nothing was given and nothing follows from the
        images' size."""
        assert request.size is not None
        given: dict[str, Any] = {"text": request.prompts, "class_label": request.class_labels}
        given |= request.conditions or {}
        for encoder in encoders_of(self.conditioner):
            if given.get(encoder.field) is None and (follows := encoder.from_size(request.size)) is not None:
                given[encoder.field] = [follows] * len(request.seeds)
        values = {field: given.get(field) for field in self.conditioner.fields}
        return {field: None if value is None else collate_values(value[part]) for field, value in values.items()}

    def _encode(
        self, batch: dict[str, Any], request: Request, part: slice, absent: Collection[str] = ()
    ) -> Conditioning:
        assert request.size is not None
        seeds = request.seeds[part]
        for encoder in encoders_of(self.conditioner):
            value = batch[encoder.field]
            if encoder.noise_levels and value is not None:
                # A stream of its own: the same draws as the first noise of the image would be seen in the picture.
                noise = SeededNoise([seed ^ CONDITION_STREAM for seed in seeds], value.shape[1:], value.device)
                batch[encoder.field] = encoder.noised(value, request.noise_level, noise(0))
        nothing = all(value is None for value in batch.values())
        conditioning = self.conditioner.null(len(seeds)) if nothing else self.conditioner(batch, absent=absent)
        width, height = request.size
        return conditioning.to(self.device).spread(-(-height // self.downsampling), -(-width // self.downsampling))

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) in [-1, 1] -> (B, C, H, W) normalised latents, the posterior's mode."""
        image = image.to(self.device)
        return image if self.first_stage is None else self.first_stage.encode(image, tile="auto").mode().float()

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, H, W) normalised latents -> (B, channels, height, width) in [-1, 1]; large ones in exact strips."""
        return latent if self.first_stage is None else self.first_stage.decode(latent, tile="auto")

    def settings(self, request: Request, nfe: int, guides: Guides | None = None) -> list[dict[str, Any]]:
        """What a picture says about how it was made, for each image of a validated request."""
        from darkroom import __version__

        guides = guides or Guides()
        c, count = guides.classifier, len(request.seeds)
        record = asdict(replace(request, conditions=None))
        record["size"] = list(request.size or ())
        if request.class_labels is not None:
            encoder = encoder_of(self.conditioner, "class_label")
            record["class_labels"] = [encoder.record("class_label", label) for label in request.class_labels]
        if request.conditions is not None:
            record["conditions"] = record_conditions(self.conditioner, request.conditions)
        return [
            {
                "version": __version__,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "model": self._identity(),
                **({} if guides.model is None else {"guide": guides.model._identity()}),
                **({} if c is None else {"classifier": {"label": c.labels_of(count)[i], "scale": c.scale}}),
                "request": record,
                "index": i,
                "nfe": nfe,
            }
            for i in range(count)
        ]

    def _identity(self) -> dict[str, Any]:
        return copy.deepcopy({k: self.info[k] for k in ("name", "sha256", "adapters") if k in self.info})

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write a model folder (safetensors and JSON), atomically."""
        from darkroom.model_io import save

        return save(self, folder, **options)


def _on_step(
    progress: Callable[[int, int], None] | None, show: Callable[[int, Tensor], None] | None, offset: int, total: int
) -> Callable[[int, Tensor], None] | None:
    """What is called after each solver step of a batch with (its number, x0); `offset` steps were made before."""
    if progress is None and show is None:
        return None

    def on_step(step: int, x0: Tensor) -> None:
        if show is not None:
            show(offset + step, x0)
        if progress is not None:
            progress(offset + step, total)

    return on_step


def _as_list(value: Any) -> list[Any] | None:
    if value is None:
        return None
    return [value] if isinstance(value, (str, int)) else list(value)
