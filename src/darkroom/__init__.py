"""Darkroom: latent diffusion models, end to end.

Names are resolved on first use, so that `import darkroom` costs milliseconds and torch is only imported when needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from darkroom.adapters import Adapter as Adapter
    from darkroom.adapters import apply_adapters as apply_adapters
    from darkroom.adapters import remove_adapters as remove_adapters
    from darkroom.conditioning.types import Conditioning as Conditioning
    from darkroom.denoiser import Denoiser as Denoiser
    from darkroom.diffusion.levels import NoiseLevel as NoiseLevel
    from darkroom.editing import edit as edit
    from darkroom.errors import DarkroomError as DarkroomError
    from darkroom.exchange import convert as convert
    from darkroom.exchange import export as export
    from darkroom.first_stage.first_stage import FirstStage as FirstStage
    from darkroom.generation_request import Request as Request
    from darkroom.generation_request import Result as Result
    from darkroom.guidance import Guided as Guided
    from darkroom.latent_diffusion import LatentDiffusion as LatentDiffusion
    from darkroom.model_io import bundled as bundled
    from darkroom.model_io import load as load
    from darkroom.model_io import load_first_stage as load_first_stage
    from darkroom.pixel_format import PixelFormat as PixelFormat
    from darkroom.reconstruction import reconstruct as reconstruct
    from darkroom.remeasure import measure as measure
    from darkroom.train_job import train as train
    from darkroom.upscaling import upscale as upscale

_HOME = {
    "Adapter": "darkroom.adapters",
    "apply_adapters": "darkroom.adapters",
    "remove_adapters": "darkroom.adapters",
    "Conditioning": "darkroom.conditioning.types",
    "Denoiser": "darkroom.denoiser",
    "DarkroomError": "darkroom.errors",
    "FirstStage": "darkroom.first_stage.first_stage",
    "Guided": "darkroom.guidance",
    "LatentDiffusion": "darkroom.latent_diffusion",
    "NoiseLevel": "darkroom.diffusion.levels",
    "PixelFormat": "darkroom.pixel_format",
    "Request": "darkroom.generation_request",
    "Result": "darkroom.generation_request",
    "bundled": "darkroom.model_io",
    "convert": "darkroom.exchange",
    "edit": "darkroom.editing",
    "export": "darkroom.exchange",
    "load": "darkroom.model_io",
    "measure": "darkroom.remeasure",
    "load_first_stage": "darkroom.model_io",
    "reconstruct": "darkroom.reconstruction",
    "train": "darkroom.train_job",
    "upscale": "darkroom.upscaling",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'darkroom' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
