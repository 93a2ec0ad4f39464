"""`Editor`: a model and a picture of any size in, the edited picture out; what was not to be changed is not.

    picture -> canvas with what outpainting adds -> windows around the holes -> model -> seam -> pasted under the mask

Shapes: N images (one per seed), C channels, H W picture, h w window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.conditioning.filling import filled
from darkroom.conditioning.requests import encoders_of
from darkroom.data.image_files import most_pixels
from darkroom.editing.holes import cut, windows_of
from darkroom.editing.seams import without_seam
from darkroom.errors import DarkroomError
from darkroom.generation_defaults import DEFAULT_MODELS
from darkroom.generation_request import Request, Result, check_seeds
from darkroom.inpaint import Start
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_pictures import checked_picture, from_network, open_whole_model, settings_from, to_network
from darkroom.pixel_format import PixelFormat

STRENGTH = 0.6  # of image-to-image
WRAPPER_SOLVER = "repaint"  # for models that were not trained with masks
_NEXT_WINDOW = 0x9E37_79B9_7F4A_7C15  # between the seeds of two windows of an image
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EditSettings:
    """None: the model's own default.

    seeds:    one image is made for each
    expand:   pixels to be added at the left, the top, the right and the bottom
    strength: how much is changed: 1 is all new. None: 1 under a mask, 0.6 without one
    prompt, class_label, negative_prompt, steps, solver, guidance_scale, eta, batch_size: as in `Request`
    window:   largest side of what the model sees at once; larger parts are made smaller first. None: twice the size
              that it was trained at
    """

    seeds: tuple[int, ...] = (0,)
    expand: tuple[int, int, int, int] = (0, 0, 0, 0)
    strength: float | None = None
    prompt: str | None = None
    class_label: str | int | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    solver: str | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    batch_size: int | None = None
    window: int | None = None


@dataclass(frozen=True)
class Edited:
    """images: one per seed, of the type and channels of the picture; settings: what made each; mask: (H, W) bool, what
    was repainted, None where all was."""

    images: list[np.ndarray]
    settings: list[dict[str, Any]]
    mask: np.ndarray | None = None


class Editor:
    """A model that repaints. Those that were trained with masks are shown the masked picture; all others are held to it
    by `Inpaint`."""

    def __init__(self, model: LatentDiffusion) -> None:
        self.model = model
        fields = set(model.conditioner.fields)
        self.knows_masks = {"image", "repaint_mask"} <= fields
        needed = [e.field for e in encoders_of(model.conditioner) if e.stays and "repaint_mask" not in e.fields]
        if needed:
            raise DarkroomError(
                f"this model was trained with {' and '.join(needed)} and makes nothing without: take one that was "
                "trained with masks, text, classes or nothing"
            )

    # --- sizes and numbers ----------------------------------------------------------------------------------------

    @property
    def _unit(self) -> int:
        """Sides of what the model sees are multiples of this."""
        return self.model.downsampling * self.model.size_multiple

    def sides(self, settings: EditSettings) -> tuple[int, int]:
        """(that of training, the largest that is not made smaller)."""
        side = max(self.model.defaults["size"])
        largest = settings.window or 2 * side
        if largest < self._unit:
            raise DarkroomError(f"a window of {largest} pixels is too small for this model; give {self._unit} or more")
        return min(side, largest), largest

    def _fitting(self, width: int, height: int, least: int, largest: int) -> tuple[int, int]:
        """(width, height) at which the model sees a window: multiples of the unit, not below `least`, nor longer than
        `largest`."""
        scale = min(1.0, largest / max(width, height))
        sides = []
        for side in (width, height):
            if scale == 1.0:
                sides.append(-(-max(side, least) // self._unit) * self._unit)
            else:
                sides.append(max(1, round(side * scale / self._unit)) * self._unit)
        return sides[0], sides[1]

    # --- edits ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray | None = None,
        settings: EditSettings | None = None,
        progress: Progress | None = None,
    ) -> Edited:
        """image (H, W) or (H, W, C) of uint8, uint16 or what the model works on; mask (H, W): what is to be repainted,
        from half of the greatest value of its type upwards. progress(steps done, of all)."""
        settings = settings or EditSettings()
        values, pixels = checked_picture(image, self.model)
        check_seeds(settings.seeds)
        facts = {"image": _digest(values), "input_size": [values.shape[1], values.shape[0]]}
        if mask is None and not any(settings.expand):
            if self.knows_masks:
                raise DarkroomError(
                    "this model repaints what is masked: give a mask or sides to expand, or take a model of text or "
                    "classes"
                )
            return self._transformed(values, image.ndim, pixels, settings, facts, progress)
        hole = None if mask is None else as_hole(mask, (values.shape[0], values.shape[1]))
        canvas, hole = expanded(values, hole, settings.expand)
        check_hole(hole)
        if mask is not None:
            facts["mask"] = _digest(hole)
        images, records = self._repainted(canvas, hole, pixels, settings, facts, progress)
        return Edited([i.reshape(i.shape[: image.ndim]) if image.ndim == 2 else i for i in images], records, hole)

    def _repainted(
        self,
        canvas: np.ndarray,
        hole: np.ndarray,
        pixels: PixelFormat,
        settings: EditSettings,
        facts: dict[str, Any],
        progress: Progress | None,
    ) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
        """One copy of the canvas (H, W, C) per seed with its hole (H, W) repainted, and their records."""
        side, largest = self.sides(settings)
        windows = windows_of(hole, side, largest)
        canvases = [canvas.copy() for _ in settings.seeds]
        missing = hole.copy()
        records: list[dict[str, Any]] = []
        for number, window in enumerate(windows):
            seen = [cut(c, window.box) for c in canvases]
            unknown, own = cut(missing, window.box), window.own(hole)
            report = None if progress is None else _counted(progress, number, len(windows))
            seeds = tuple((seed + number * _NEXT_WINDOW) % 2**63 for seed in settings.seeds)
            result, made = self._window(seen, unknown, pixels, replace(settings, seeds=seeds), side, largest, report)
            for part, new in zip(seen, made, strict=True):
                part[own] = new[own]  # a view: the canvas itself
            missing[window.box[1] : window.box[3], window.box[0] : window.box[2]] &= ~own
            records = records or result.settings
        facts |= {
            "strength": 1.0 if settings.strength is None else settings.strength,
            "expand": list(settings.expand),
            "windows": [list(window.box) for window in windows],
            "window": largest,
        }
        for record in records:  # those of the first window, which has the images' own seeds
            record["edit"] = facts
        return canvases, records

    def _window(
        self,
        seen: list[np.ndarray],
        unknown: np.ndarray,
        pixels: PixelFormat,
        settings: EditSettings,
        side: int,
        largest: int,
        progress: Progress | None,
    ) -> tuple[Result, list[np.ndarray]]:
        """Windows (h, w, C) of N canvases -> the same with something new where `unknown` (h, w) is True. What they show
        elsewhere is not meant to be used."""
        height, width = unknown.shape
        size = self._fitting(width, height, side, largest)
        picture = torch.stack([to_network(part, pixels, self.model.image_channels) for part in seen])
        mask = torch.from_numpy(unknown.astype(np.float32))[None, None]
        smaller = max(width, height) > largest
        # What is to go must reach what is kept neither by a filter nor through the encoder.
        clean = (
            picture if settings.strength not in (None, 1) else filled(picture, mask.expand(len(picture), -1, -1, -1))
        )
        given, hole = (_smaller if smaller else _padded)(clean, mask, size)
        result = self._generate(given, hole, settings, progress)
        new = self._decoded(result, pixels)
        if smaller:
            new = F.interpolate(new, size=(height, width), mode="bicubic", antialias=True)
        new = without_seam(new[..., :height, :width], picture, mask.expand(len(picture), -1, -1, -1))
        return result, [from_network(one, pixels, seen[0].shape[2]) for one in new]

    def _generate(
        self, given: Tensor, hole: Tensor | None, settings: EditSettings, progress: Progress | None
    ) -> Result:
        """given (N, C, h, w) in [-1, 1], hole (1, 1, h, w) or None."""
        strength = settings.strength if settings.strength is not None else 1.0 if hole is not None else STRENGTH
        conditions, start, solver = None, None, settings.solver
        if hole is not None and self.knows_masks:
            conditions = {"image": list(given), "repaint_mask": [hole[0]] * len(given)}
            start = None if strength == 1 else Start(given, None, strength)
        elif hole is not None:
            start = Start(given, hole, strength)
            solver = solver or WRAPPER_SOLVER
        else:
            start = Start(given, None, strength)
        request = Request(
            prompts=None if settings.prompt is None else [settings.prompt],
            class_labels=None if settings.class_label is None else [settings.class_label],
            seeds=list(settings.seeds),
            steps=settings.steps,
            solver=solver,
            guidance_scale=settings.guidance_scale,
            eta=settings.eta,
            negative_prompt=settings.negative_prompt,
            batch_size=settings.batch_size,
            size=(given.shape[3], given.shape[2]),
            conditions=conditions,
        )
        return self.model.generate(request, start=start, progress=progress)

    def _transformed(
        self,
        values: np.ndarray,
        ndim: int,
        pixels: PixelFormat,
        settings: EditSettings,
        facts: dict[str, Any],
        progress: Progress | None,
    ) -> Edited:
        """Image-to-image: all of the picture, at a size that the model can make."""
        height, width, channels = values.shape
        _, largest = self.sides(settings)
        scale = min(1.0, largest / max(width, height))
        size = [max(1, round(side * scale / self._unit)) * self._unit for side in (width, height)]
        given = to_network(values, pixels, self.model.image_channels)[None]
        if size != [width, height]:
            given = F.interpolate(given, size=(size[1], size[0]), mode="bicubic", antialias=True).clamp(-1, 1)
        result = self._generate(given.expand(len(settings.seeds), -1, -1, -1), None, settings, progress)
        new = self._decoded(result, pixels)
        images = [from_network(one, pixels, channels) for one in new]
        facts["strength"] = STRENGTH if settings.strength is None else settings.strength
        for record in result.settings:
            record["edit"] = facts
        return Edited([i[..., 0] if ndim == 2 else i for i in images], result.settings)

    def _decoded(self, result: Result, pixels: PixelFormat) -> Tensor:
        """(N, C, h, w) in [-1, 1], decoded again where the picture has more bits than the model's images."""
        if pixels.bits > self.model.pixels.bits:
            return self.model.decode(result.latents.to(self.model.device)).float().cpu()
        return self.model.pixels.to_network(torch.from_numpy(result.images).permute(0, 3, 1, 2))


def _padded(picture: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Picture and mask mirrored at the right and at the bottom up to (width, height)."""
    height, width = mask.shape[2:]
    sides = ((0, 0), (0, 0), (0, size[1] - height), (0, size[0] - width))
    both = (torch.from_numpy(np.pad(values.numpy(), sides, mode="symmetric")) for values in (picture, mask))
    return next(both), next(both)


def _smaller(picture: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Picture and mask at (width, height); a pixel is masked if any of those that it is made of is."""
    shape = (size[1], size[0])
    small = F.interpolate(picture, size=shape, mode="bicubic", antialias=True).clamp(-1, 1)
    return small, F.adaptive_max_pool2d(mask, shape)


def as_hole(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W), perhaps with an axis of one channel -> (H, W) bool. Raises DarkroomError for another size."""
    values = mask[..., 0] if mask.ndim == 3 and mask.shape[2] == 1 else mask
    if values.shape != shape:
        found = f"{values.shape[1]}x{values.shape[0]}" if values.ndim == 2 else f"of shape {mask.shape}"
        raise DarkroomError(f"the mask is {found}, the picture {shape[1]}x{shape[0]}: give both the same size")
    if values.dtype == np.bool_:
        return values
    half = np.iinfo(values.dtype).max / 2 if values.dtype.kind in "iu" else 0.5
    return values >= half


def expanded(
    values: np.ndarray, hole: np.ndarray | None, sides: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Picture (H, W, C) and hole with so many pixels added at the left, top, right and bottom, all of them to be
    repainted."""
    if min(sides) < 0:
        raise DarkroomError(f"expand is {','.join(map(str, sides))}: give pixels to add, from 0 on")
    left, top, right, bottom = sides
    height, width = values.shape[0] + top + bottom, values.shape[1] + left + right
    if width * height > most_pixels():
        raise DarkroomError(
            f"the picture would become {width}x{height}, more than can be read again; expand it by less"
        )
    inside = np.zeros(values.shape[:2], bool) if hole is None else hole
    border = ((top, bottom), (left, right))
    # The colour of the border is never seen, but it is stored until it is repainted.
    return np.pad(values, (*border, (0, 0)), mode="edge"), np.pad(inside, border, constant_values=True)


def check_hole(hole: np.ndarray) -> None:
    if not hole.any():
        raise DarkroomError("the mask is black everywhere: there is nothing to repaint; white is what is repainted")
    if hole.all():
        raise DarkroomError(
            "the mask is white everywhere: nothing of the picture would be left; white is what is repainted, black is "
            "kept"
        )


def _counted(progress: Progress, before: int, windows: int) -> Progress:
    return lambda done, total: progress(before * total + done, windows * total)


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def edit(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    model: LatentDiffusion | str = DEFAULT_MODELS["edit"],
    *,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Edited:
    """A picture (H, W) or (H, W, C) with what the mask (H, W) marks repainted; see `EditSettings` for the rest: seeds=
    (one, or several), expand= for outpainting (of all sides, or left, top, right, bottom), strength= and prompt= for
    image-to-image, ...

    What is not marked comes back bit for bit.
    """
    opened = open_whole_model(model, device, "can repaint")
    for name, count in (("seeds", 1), ("expand", 4)):
        if isinstance(value := settings.get(name), int):
            settings[name] = (value,) * count
    return Editor(opened)(image, mask, settings_from(EditSettings, settings, "edit"), progress)
