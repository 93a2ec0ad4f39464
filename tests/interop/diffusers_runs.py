"""diffusers' pipelines and our models on the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.diffusion.grids import Grid, make_grid
from darkroom.guidance import Guided
from darkroom.interop.found_model import FoundModel, find_model
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load
from darkroom.solvers import ddim, euler

PROMPTS = ["the red fox", "a cat"]
STEPS = 4
GUIDANCE = 3.0


def silence() -> None:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def found(path: Path) -> FoundModel:
    result = find_model(path)
    assert result is not None
    return result


def loaded(path: Path) -> LatentDiffusion:
    model = load(path, device="cpu")
    assert isinstance(model, LatentDiffusion)
    return model


def contents(folder: Path) -> dict[str, Tensor]:
    """All tensors of the components, by folder and name; releases of transformers differ in one level of names."""
    result = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        file = open_tensor_file(path)
        result |= {f"{path.parent.name}/{name}": tensor for name, tensor in file.read(file.shapes).items()}
    result = {name.replace("/text_model.", "/"): tensor for name, tensor in result.items()}
    return {name: tensor for name, tensor in result.items() if not name.startswith("darkroom/")}


def pipeline(folder: Path, cls: Any = None, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    silence()
    result = (cls or DiffusionPipeline).from_pretrained(folder, **options)
    result.set_progress_bar_config(disable=True)
    return result


def with_ddim(other: Any) -> Any:
    """The method of the paper, on the noise of the pipeline's own scheduler."""
    from diffusers import DDIMScheduler

    usual = {"set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1, "timestep_spacing": "leading"}
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config, **usual)
    return other


def noise(channels: int, side: int, count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def solve(
    model: LatentDiffusion, given: Conditioning, null: Conditioning | None, x: Tensor, grid: Grid | None = None
) -> Tensor:
    """With their levels: those of the paper's DDIM, or of the official SD 3 code."""
    denoise = Guided(model.denoiser, given, null, GUIDANCE if null is not None else 1.0)
    schedule = model.denoiser.schedule
    if schedule.config.kind == "flow":
        return euler(denoise, x, grid or make_grid(schedule, STEPS, "sd3"))
    return ddim(denoise, x, grid or make_grid(schedule, STEPS, "ddim"))


def assert_close(ours: Tensor, other: Tensor) -> None:
    assert ours.shape == other.shape
    assert other.std() > 0.05
    assert float((ours - other).abs().max()) < 1e-3
