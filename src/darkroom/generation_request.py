"""What is asked of a model: `Request`, and what it must be before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from darkroom.conditioning.classes import ClassEncoder
from darkroom.conditioning.requests import encoder_of, encoders_of, read_conditions
from darkroom.conditioning.tokens import plain_text, plain_texts
from darkroom.config import nearest
from darkroom.errors import DarkroomError
from darkroom.inpaint import Start
from darkroom.solvers import SOLVERS, default_eta

if TYPE_CHECKING:
    from darkroom.latent_diffusion import LatentDiffusion

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


def validated(model: LatentDiffusion, request: Request) -> Request:
    """The request with every default filled in and lists of equal length, or a DarkroomError that says the cure."""
    chosen = {k: v for k, v in model.defaults.items() if getattr(request, k, None) is None and hasattr(request, k)}
    request = replace(request, **chosen)
    if request.solver not in SOLVERS:
        raise DarkroomError(f'solver "{request.solver}" is not known{nearest(str(request.solver), SOLVERS)}')
    if not request.steps or request.steps < 1:
        raise DarkroomError(f"steps is {request.steps}: it must be at least 1")
    if not request.batch_size or request.batch_size < 1:
        raise DarkroomError(f"batch size is {request.batch_size}: it must be at least 1")
    request = replace(request, eta=_eta(str(request.solver), request.eta))
    assert request.size is not None
    if request.guidance_scale is None or not math.isfinite(request.guidance_scale):
        raise DarkroomError(f"guidance scale is {request.guidance_scale}: it must be a finite number; 1 is off")
    check_seeds(request.seeds)
    _check_size(model, request.size)
    _check_guidance(model, request)
    fields = model.conditioner.fields
    for given, name, flag in (
        (request.prompts, "text", "a prompt"),
        (request.class_labels, "class_label", "a class"),
    ):
        if given is not None and name not in fields:
            takes = " or ".join(sorted(fields)) if fields else "no condition at all"
            raise DarkroomError(f"this model does not take {flag}: it was trained with {takes}")
    conditions = read_conditions(model.conditioner, request.conditions, request.size)
    if request.noise_level is not None and not any(e.noise_levels for e in encoders_of(model.conditioner)):
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
        encoder = encoder_of(model.conditioner, "class_label")
        labels = [encoder.from_request("class_label", label, request.size) for label in request.class_labels]
    return replace(
        request,
        prompts=spread("prompts", plain_texts(request.prompts)),
        negative_prompt=plain_text(request.negative_prompt),
        class_labels=spread("classes", labels),
        seeds=spread("seeds", request.seeds) or [],
        conditions={name: spread(name, values) for name, values in conditions.items()} or None,
    )


def _eta(solver: str, eta: float | None) -> float | None:
    """The share of fresh noise per step: what is given, else the solver's own; None for solvers that draw none."""
    default = default_eta(solver)
    if default is None and eta:
        takers = ", ".join(name for name in SOLVERS if default_eta(name) is not None)
        raise DarkroomError(f'eta is an option of {takers}; "{solver}" has none: leave one of them out')
    if eta is not None and not 0 <= eta <= 1:
        raise DarkroomError(f"eta is {eta}: it must be from 0 (no fresh noise) to 1")
    return None if default is None else default if eta is None else eta


def check_seeds(seeds: Sequence[int]) -> None:
    bad = [seed for seed in seeds if not 0 <= seed < 2**63]
    if not seeds or bad:
        raise DarkroomError(f"seed {bad[0] if bad else '(none)'}: a seed is a whole number from 0 to 2^63-1")


def _check_guidance(model: LatentDiffusion, request: Request) -> None:
    for name, scale in (request.guidance or {}).items():
        if name not in model.conditioner.encoders:
            raise DarkroomError(
                f'guidance: this model has no condition "{name}"{nearest(name, model.conditioner.encoders)}'
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


def check_guide(model: LatentDiffusion, guide: LatentDiffusion) -> None:
    """A guide works on the same latents, with the same noise, and knows the same classes."""
    for what, own, other in (
        ("latent channels", model.latent_channels, guide.latent_channels),
        ("downsampling", model.downsampling, guide.downsampling),
        ("noise schedule", model.denoiser.schedule.config, guide.denoiser.schedule.config),
        ("classes", _class_names(model), _class_names(guide)),
    ):
        if own != other and None not in (own, other):
            shown = f"{own} against {other}" if isinstance(own, int) else "it"
            raise DarkroomError(f"the guide differs from the model in its {what} ({shown}); take one trained alike")


def check_start(model: LatentDiffusion, start: Start, request: Request) -> None:
    assert request.size is not None
    width, height = request.size
    for name, values, channels in (("image", start.image, model.image_channels), ("mask", start.mask, 1)):
        if values is None:
            continue
        if values.ndim != 4 or values.shape[0] not in (1, len(request.seeds)):
            raise DarkroomError(f"start: the {name} has shape {tuple(values.shape)}; give one for all images or each")
        if tuple(values.shape[1:]) != (channels, height, width):
            shape = "x".join(map(str, values.shape[1:]))
            raise DarkroomError(f"start: the {name} is {shape}, it must be {channels}x{height}x{width} for this image")


def _check_size(model: LatentDiffusion, size: tuple[int, int]) -> None:
    factor = model.downsampling * model.size_multiple
    for name, value in zip(("width", "height"), size, strict=True):
        if value < factor or value % factor:
            low = max(factor, value // factor * factor)
            raise DarkroomError(
                f"{name} {value} does not fit this model: sizes are multiples of {factor}, "
                f"the nearest are {low} and {low + factor}"
            )


def _class_names(model: LatentDiffusion) -> list[str] | None:
    encoders = [e for e in encoders_of(model.conditioner) if isinstance(e, ClassEncoder)]
    return list(encoders[0].config.classes) if encoders else None
