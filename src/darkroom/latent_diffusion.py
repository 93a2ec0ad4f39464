"""`LatentDiffusion`: first stage, denoiser and conditioner together. The only place where all three meet.

Shapes: B batch, C latent channels, H W latent size; images are (B, height, width, channels) at this edge, in the
model's pixel type.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darkroom.classifier_guidance import ClassifierGuide, ClassifierGuided
from darkroom.conditioning.classes import ClassEncoder
from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.requests import (
    collate_values,
    encoder_of,
    encoders_of,
    named_encoders,
    read_conditions,
    record_conditions,
)
from darkroom.conditioning.tokens import plain_text, plain_texts
from darkroom.conditioning.types import Conditioning
from darkroom.config import nearest
from darkroom.denoiser import Denoiser
from darkroom.diffusion.grids import Grid, make_grid
from darkroom.diffusion.noise import SeededNoise
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.guidance import Guide, Guided
from darkroom.inpaint import Start, begin
from darkroom.pixel_format import PixelFormat
from darkroom.solvers import SOLVERS, default_eta, default_spacing
from darkroom.solvers.common import Denoise, Noise

CONDITION_STREAM = 0x5EED_C0DE  # of the noise that is added to a condition, by exclusive or with an image's seed
DEFAULTS: dict[str, Any] = {"steps": 20, "guidance_scale": 4.0, "solver": "dpm++2m", "batch_size": 16}


@dataclass(frozen=True)
class Request:
    """What to generate. None takes the model's own default (`LatentDiffusion.defaults`).

    Lists of prompts (or class labels) and seeds have equal lengths, or one of them has a single entry for all images.
    A prompt is a string, or the token ids of one: [49406, ...]; by tower where there are two vocabularies.
    `size` is (width, height) in pixels; `class_labels` are names or indices. `eta` is the share of fresh noise per
    step, for solvers that draw noise. `conditions`: what else the model takes, by field (`boxes`, `segmentation`, ...):
    one value per image, or one for all. `noise_level`: for models that were trained with noise on a condition.
    `guidance`: scales of single conditions, by the name of their encoder, in place of `guidance_scale`; then guidance
    adds one condition after the other, in the conditioner's order, each with its scale. `guidance_interval`: low and
    high in sigma/alpha, outside of which there is none. `guidance_rescale`: see `guidance.combine`.
    """

    prompts: list[Any] | None = None
    class_labels: list[str | int] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    eta: float | None = None
    size: tuple[int, int] | None = None
    negative_prompt: Any = None
    batch_size: int | None = None
    conditions: dict[str, Any] | None = None
    noise_level: int | None = None
    guidance: dict[str, float] | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0


@dataclass(frozen=True)
class Result:
    """images: (B, height, width, channels) in the model's pixel type, for most models uint8; latents: (B, C, H, W)
    normalised; nfe: network calls per image; settings: one dict per image that repeats it."""

    images: np.ndarray
    latents: Tensor
    nfe: int
    settings: list[dict[str, Any]]


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
            self._check_guide(guide)
        if start is not None:
            self._check_start(start, request)
        return self._run(request, Guides(guide, classifier), start, progress, show)

    def validate(self, request: Request) -> Request:
        """The request with every default filled in and lists of equal length, or a DarkroomError that says the cure."""
        chosen = {k: v for k, v in self.defaults.items() if getattr(request, k, None) is None and hasattr(request, k)}
        request = replace(request, **chosen)
        if request.solver not in SOLVERS:
            raise DarkroomError(f'solver "{request.solver}" is not known{nearest(str(request.solver), SOLVERS)}')
        if not request.steps or request.steps < 1:
            raise DarkroomError(f"steps is {request.steps}: it must be at least 1")
        if not request.batch_size or request.batch_size < 1:
            raise DarkroomError(f"batch size is {request.batch_size}: it must be at least 1")
        request = replace(request, eta=self._eta(str(request.solver), request.eta))
        assert request.size is not None
        if request.guidance_scale is None or not math.isfinite(request.guidance_scale):
            raise DarkroomError(f"guidance scale is {request.guidance_scale}: it must be a finite number; 1 is off")
        bad_seeds = [s for s in request.seeds if not 0 <= s < 2**63]
        if not request.seeds or bad_seeds:
            raise DarkroomError(
                f"seed {bad_seeds[0] if bad_seeds else '(none)'}: a seed is a whole number from 0 to 2^63-1"
            )
        self._check_size(request.size)
        self._check_guidance(request)
        fields = self.conditioner.fields
        for given, name, flag in (
            (request.prompts, "text", "a prompt"),
            (request.class_labels, "class_label", "a class"),
        ):
            if given is not None and name not in fields:
                takes = " or ".join(sorted(fields)) if fields else "no condition at all"
                raise DarkroomError(f"this model does not take {flag}: it was trained with {takes}")
        conditions = read_conditions(self.conditioner, request.conditions, request.size)
        if request.noise_level is not None and not any(e.noise_levels for e in encoders_of(self.conditioner)):
            raise DarkroomError("this model was trained without noise on a condition: leave the noise level out")
        if request.negative_prompt is not None and "text" not in fields:
            raise DarkroomError("a negative prompt needs a model with a text encoder; this one has none")
        lists: list[Sequence[Any]] = [request.seeds, request.prompts or [], request.class_labels or []]
        count = max(len(values) for values in [*lists, *conditions.values()])

        def spread(name: str, values: list[Any] | None) -> list[Any] | None:
            if values is None or len(values) == count:
                return values
            if len(values) == 1:
                return values * count
            raise DarkroomError(f"{len(values)} {name} for {count} images: give one for all or one for each")

        labels = None
        if request.class_labels is not None:
            encoder = encoder_of(self.conditioner, "class_label")
            labels = [encoder.from_request("class_label", label, request.size) for label in request.class_labels]
        return replace(
            request,
            prompts=spread("prompts", plain_texts(request.prompts)),
            negative_prompt=plain_text(request.negative_prompt),
            class_labels=spread("classes", labels),
            seeds=spread("seeds", request.seeds) or [],
            conditions={name: spread(name, values) for name, values in conditions.items()} or None,
        )

    def _eta(self, solver: str, eta: float | None) -> float | None:
        """The share of fresh noise per step: what is given, else the solver's own; None for solvers that draw none."""
        default = default_eta(solver)
        if default is None and eta:
            takers = ", ".join(name for name in SOLVERS if default_eta(name) is not None)
            raise DarkroomError(f'eta is an option of {takers}; "{solver}" has none: leave one of them out')
        if eta is not None and not 0 <= eta <= 1:
            raise DarkroomError(f"eta is {eta}: it must be from 0 (no fresh noise) to 1")
        return None if default is None else default if eta is None else eta

    def _check_guidance(self, request: Request) -> None:
        for name, scale in (request.guidance or {}).items():
            if name not in self.conditioner.encoders:
                raise DarkroomError(
                    f'guidance: this model has no condition "{name}"{nearest(name, self.conditioner.encoders)}'
                )
            if not math.isfinite(scale):
                raise DarkroomError(f"guidance of {name} is {scale}: it must be a finite number; 1 is off")
        if request.guidance_interval is not None:
            low, high = request.guidance_interval
            if not 0 <= low < high:
                raise DarkroomError(
                    f"guidance interval {low:g} to {high:g}: give two sigma/alpha, 0 or more, the lower one first"
                )
        if not 0 <= request.guidance_rescale <= 1:
            raise DarkroomError(f"guidance rescale is {request.guidance_rescale}: it must be from 0 (off) to 1")

    def _check_guide(self, guide: LatentDiffusion) -> None:
        """A guide works on the same latents, with the same noise, and knows the same classes."""
        for what, own, other in (
            ("latent channels", self.latent_channels, guide.latent_channels),
            ("downsampling", self.downsampling, guide.downsampling),
            ("noise schedule", self.denoiser.schedule.config, guide.denoiser.schedule.config),
            ("classes", _class_names(self), _class_names(guide)),
        ):
            if own != other and None not in (own, other):
                shown = f"{own} against {other}" if isinstance(own, int) else "it"
                raise DarkroomError(f"the guide differs from the model in its {what} ({shown}); take one trained alike")

    def _check_start(self, start: Start, request: Request) -> None:
        assert request.size is not None
        width, height = request.size
        for name, values, channels in (("image", start.image, self.image_channels), ("mask", start.mask, 1)):
            if values is None:
                continue
            if values.ndim != 4 or values.shape[0] not in (1, len(request.seeds)):
                raise DarkroomError(
                    f"start: the {name} has shape {tuple(values.shape)}; give one for all images or each"
                )
            if tuple(values.shape[1:]) != (channels, height, width):
                shape = "x".join(map(str, values.shape[1:]))
                raise DarkroomError(
                    f"start: the {name} is {shape}, it must be {channels}x{height}x{width} for this image"
                )

    def _check_size(self, size: tuple[int, int]) -> None:
        factor = self.downsampling * self._network_config.size_multiple
        for name, value in zip(("width", "height"), size, strict=True):
            if value < factor or value % factor:
                low = max(factor, value // factor * factor)
                raise DarkroomError(
                    f"{name} {value} does not fit this model: sizes are multiples of {factor}, "
                    f"the nearest are {low} and {low + factor}"
                )

    @property
    def _network_config(self) -> Any:
        return self.denoiser.network.config

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


def _class_names(model: LatentDiffusion) -> list[str] | None:
    encoders = [e for e in encoders_of(model.conditioner) if isinstance(e, ClassEncoder)]
    return list(encoders[0].config.classes) if encoders else None


def _as_list(value: Any) -> list[Any] | None:
    if value is None:
        return None
    return [value] if isinstance(value, (str, int)) else list(value)
