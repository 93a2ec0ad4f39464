"""`upscale`: a picture of any size through a model that was trained on small ones.

    picture -> padded to what the network can halve -> conditioning of the whole canvas -> noise of the whole canvas
    -> solver, in each step all windows -> decoded in exact strips -> cut -> made consistent with the picture if asked

Shapes: C channels, H W picture, h w latent canvas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darkroom.conditioning.maps import LowResolutionConfig
from darkroom.conditioning.requests import encoders_of
from darkroom.diffusion.noise import SeededNoise
from darkroom.errors import DarkroomError
from darkroom.first_stage.tiling import Tiling, available_memory
from darkroom.generation_defaults import DEFAULT_MODELS
from darkroom.generation_request import Request
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_pictures import checked_picture, grey_again, open_whole_model, settings_from, to_network
from darkroom.pixel_format import LIMITS, PixelFormat
from darkroom.upscaling.consistency import consistent
from darkroom.upscaling.windows import WindowedDenoise, make_windows

# Windows larger than what the model was trained at are better and faster: fewer borders, and less is averaged away.
WINDOW_SIZES = 4
DECODER_MEMORY_GB = 1.5  # beyond the picture itself; larger decoders' maps go to temporary files
Progress = Callable[[str, float, int], None]


@dataclass(frozen=True)
class UpscaleSettings:
    """None: the model's own default.

    seed, steps, solver, guidance_scale, eta, noise_level, prompt: as in `Request`
    consistency: the result made smaller is the picture: see `upscaling.consistency`
    window: side of the windows in pixels of the result; None: four times the size that the model was trained at
    overlap: what neighbouring windows share at least, in pixels of the result; None: a quarter of the window
    batch_size: windows at a time; None: as many as hold as much as the model's own batch of images
    """

    seed: int = 0
    steps: int | None = None
    solver: str | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    noise_level: int | None = None
    prompt: str | None = None
    consistency: bool = False
    window: int | None = None
    overlap: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Upscaled:
    """image: (H, W, C) of the type of the picture that was given; settings: what made it; difference: with consistency,
    the greatest difference between the picture and the result made smaller, before rounding; else None."""

    image: np.ndarray
    settings: dict[str, Any]
    difference: float | None = None


@dataclass(frozen=True)
class Canvas:
    """small: (width, height) of the padded picture; latent: of the latent canvas; both larger than the picture where
    the network could not halve it often enough, or was trained at more."""

    small: tuple[int, int]
    latent: tuple[int, int]


class Upscaler:
    """A model that enlarges or sharpens pictures. Raises DarkroomError for any other model."""

    def __init__(self, model: LatentDiffusion) -> None:
        self.model = model
        fields = [e for e in encoders_of(model.conditioner) if e.field == "low_resolution"]
        config: Any = getattr(fields[0], "config", None) if fields else None
        if not isinstance(config, LowResolutionConfig) or not config.factor:
            takes = " or ".join(sorted(model.conditioner.fields)) or "no condition at all"
            raise DarkroomError(
                f"this model does not enlarge pictures (it was trained with {takes}); take one that was trained with "
                "low_resolution, such as the recipe clothing-sr makes"
            )
        self.factor = config.factor

    @cached_property
    def damage(self) -> str | None:
        """What was done to its training pictures besides making them smaller by bicubic, where it says so."""
        recorded = (self.model.info.get("data") or {}).get("low_resolution")
        if not isinstance(recorded, dict):
            return None
        pipeline, blur = recorded.get("pipeline", "bicubic"), recorded.get("blur", 0)
        if pipeline != "bicubic":
            return str(pipeline)
        return None if blur in (0, None) else f"blur {blur}"

    # --- sizes ----------------------------------------------------------------------------------------------------

    @property
    def _unit(self) -> int:
        """Sides of padded pictures are multiples of this."""
        multiple = self.model.downsampling * self.model.size_multiple
        return multiple // math.gcd(self.factor, multiple)

    def canvas(self, width: int, height: int) -> Canvas:
        """For a picture of so many pixels: at least of the size that the model was trained at."""
        trained = self.model.defaults["size"]
        least = [-(-side // self.factor) for side in trained]
        small = [
            -(-max(side, low) // self._unit) * self._unit for side, low in zip((width, height), least, strict=True)
        ]
        latent = [side * self.factor // self.model.downsampling for side in small]
        return Canvas((small[0], small[1]), (latent[0], latent[1]))

    def window(self, settings: UpscaleSettings) -> tuple[int, int]:
        """(side, overlap) in latent places."""
        f, multiple = self.model.downsampling, self.model.size_multiple
        pixels = settings.window or WINDOW_SIZES * max(self.model.defaults["size"])
        side = max(pixels // (f * multiple), 1) * multiple
        most = side // 2 if side > multiple else 0  # windows begin at multiples: a single one cannot be shared
        overlap = min(side // 4, most) if settings.overlap is None else -(-settings.overlap // f)
        if not 0 <= overlap <= most:
            raise DarkroomError(
                f"windows of {side * f} pixels overlap by 0 to {most * f}, not by {settings.overlap}; change "
                "--overlap or --window"
            )
        return side, overlap

    def _windows_at_a_time(self, settings: UpscaleSettings) -> int:
        side = self.window(settings)[0] * self.model.downsampling
        width, height = self.model.defaults["size"]
        return max(1, int(self.model.defaults["batch_size"]) * width * height // side**2)

    def check_memory(self, width: int, height: int, consistency: bool = False) -> None:
        """Complain before any work is done when the result does not fit in memory."""
        values = width * height * self.factor**2 * self.model.image_channels
        # Three copies of the result in float32 exist at one time, and eight while it is made consistent.
        needed = values * 4 * (8 if consistency else 3) + DECODER_MEMORY_GB * 1e9
        free = available_memory(torch.device("cpu"))
        if needed > free:
            raise DarkroomError(
                f"{width}x{height} becomes {width * self.factor}x{height * self.factor}, which needs about "
                f"{needed / 1e9:.0f} GB of memory where {free / 1e9:.0f} GB are free; cut it into parts, or make it "
                "smaller first"
            )

    # --- the work -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self, image: np.ndarray, settings: UpscaleSettings | None = None, progress: Progress | None = None
    ) -> Upscaled:
        """(H, W) or (H, W, C) of uint8, uint16 or what the model works on -> `factor` times larger, in the same type
        and with as many channels (grey stays grey). progress(doing, done, total)."""
        settings = settings or UpscaleSettings()
        values, pixels = checked_picture(image, self.model)
        height, width, channels = values.shape
        if settings.consistency:
            self._check_consistency()
        self.check_memory(width, height, settings.consistency)
        latent, record = self._denoise(to_network(values, pixels, self.model.image_channels), settings, progress)
        decoded = grey_again(self._decode(latent, (width, height), progress), channels)
        difference = None
        result = pixels.from_network(decoded)
        if settings.consistency:
            _tell(progress, "making consistent", 0, 1)
            small = torch.from_numpy(values.transpose(2, 0, 1).astype(np.float32))
            whole = pixels.dtype in LIMITS
            start = _numbers(decoded, pixels)
            corrected, difference = consistent(start, small, pixels.low, pixels.high, whole)
            result = corrected.to(result.dtype)
            record["upscale"]["difference"] = round(difference, 6)
        out = result.permute(1, 2, 0).contiguous().numpy()
        return Upscaled(out.reshape(out.shape[:2] + image.shape[2:]), record, difference)

    def _check_consistency(self) -> None:
        if self.factor == 1:
            raise DarkroomError(
                "this model sharpens pictures of the same size, which leaves nothing to be consistent with; leave "
                "consistency out"
            )
        if self.damage is not None:
            raise DarkroomError(
                f"this model was trained to undo damage ({self.damage}), which consistency would keep; leave it out, "
                "or take a model for bicubic pictures"
            )

    def _denoise(
        self, network: Tensor, settings: UpscaleSettings, progress: Progress | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The picture (C, H, W) in [-1, 1] -> the latent canvas (1, E, h, w), and the settings that made it."""
        height, width = network.shape[1:]
        canvas = self.canvas(width, height)
        padding = ((0, 0), (0, canvas.small[1] - height), (0, canvas.small[0] - width))
        padded = torch.from_numpy(np.pad(network.numpy(), padding, mode="symmetric"))
        model = self.model
        request = model.validate(
            Request(
                prompts=None if settings.prompt is None else [settings.prompt],
                seeds=[settings.seed],
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                solver=settings.solver,
                eta=settings.eta,
                size=(canvas.small[0] * self.factor, canvas.small[1] * self.factor),
                batch_size=settings.batch_size or self._windows_at_a_time(settings),
                noise_level=settings.noise_level,
                conditions={"low_resolution": padded},
            )
        )
        assert request.steps and request.batch_size
        side, overlap = self.window(settings)
        columns, rows = canvas.latent
        windows = make_windows(rows, columns, side, overlap, self.model.size_multiple)
        total = request.steps * len(windows)
        calls = 0

        def on_windows(done: int) -> None:
            nonlocal calls
            # Solvers that look twice per step are shown half as far at the first look.
            _tell(progress, "upscaling", min(calls * len(windows) + done, total), total)
            calls += done == len(windows)

        denoise = WindowedDenoise(model.guided(request, slice(0, 1)), windows, request.batch_size, on_windows)
        noise = SeededNoise(request.seeds, (model.latent_channels, rows, columns), model.device)
        latent = model.solve(request, denoise, noise, min(side, rows) * min(side, columns))
        if not bool(latent.isfinite().all()):
            raise DarkroomError("the result is not finite; use float32 weights, or another checkpoint of the model")
        record = model.settings(request, denoise.nfe)[0]
        f = model.downsampling
        record["upscale"] = {
            "factor": self.factor,
            "input_size": [width, height],
            "window": side * f,
            "overlap": overlap * f,
            "windows": len(windows),
            "consistency": settings.consistency,
        }
        return latent, record

    def _decode(self, latent: Tensor, small: tuple[int, int], progress: Progress | None) -> Tensor:
        """(1, E, h, w) -> (C, H, W) on the CPU, cut to what the picture becomes."""
        _tell(progress, "decoding", 0, 1)
        stage = self.model.first_stage
        width, height = small[0] * self.factor, small[1] * self.factor
        image = latent if stage is None else stage.decode(latent, tile=Tiling(memory_gb=DECODER_MEMORY_GB))
        if not bool(image.isfinite().all()):
            raise DarkroomError("the result is not finite; use float32 weights, or another checkpoint of the model")
        return image[0, :, :height, :width].float().cpu()


def _numbers(image: Tensor, pixels: PixelFormat) -> Tensor:
    """(C, H, W) in [-1, 1] -> numbers of the file, not rounded."""
    return (image.clamp(-1, 1) + 1) * ((pixels.high - pixels.low) / 2) + pixels.low


def _tell(progress: Progress | None, doing: str, done: float, total: int) -> None:
    if progress is not None:
        progress(doing, done, total)


def upscale(
    image: np.ndarray,
    model: LatentDiffusion | str = DEFAULT_MODELS["upscale"],
    *,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Upscaled:
    """A picture (H, W) or (H, W, C) enlarged, or sharpened, by a model that was trained with low_resolution.

    settings: those of `UpscaleSettings`: seed=, steps=, consistency=, window=, ...
    """
    opened = open_whole_model(model, device, "was trained with low_resolution")
    return Upscaler(opened)(image, settings_from(UpscaleSettings, settings, "upscale"), progress)
