"""The same noise gives the same latents in diffusers and here: from folders that diffusers wrote, and from ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_runs import GUIDANCE, PROMPTS, STEPS, assert_close, loaded, noise, pipeline, solve, with_ddim

from darkroom.conditioning.augmentation import IMAGE_NOISE, with_noise
from darkroom.conditioning.types import Conditioning
from darkroom.diffusion.grids import make_grid
from darkroom.exchange import export

RUN: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}


@pytest.fixture(params=["theirs", pytest.param("exported", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, theirs: Path, tmp_path: Path) -> Any:
    """Where diffusers takes a pipeline from: its own folder, or the one that we write for the model we loaded."""

    def of(name: str) -> Path:
        if request.param == "theirs":
            return theirs / name
        return export(loaded(theirs / name), tmp_path / name, format="diffusers")

    return of


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3"])
def test_text_to_image(name: str, theirs: Path, folder: Any) -> None:
    model, x = loaded(theirs / name), noise(4, 16)
    batch: dict[str, Any] = {"text": PROMPTS}
    if name == "sdxl":
        sizes = model.conditioner.encoders["sizes"].from_size((32, 32))  # type: ignore[union-attr,operator]
        batch["sizes"] = sizes.expand(2, -1)
    given, null = model.conditioner(batch), model.conditioner(batch, absent=["text"])
    other = pipeline(folder(name))
    if name != "sd3":
        other = with_ddim(other)
    assert_close(solve(model, given, null, x), other(PROMPTS, latents=x, height=32, width=32, **RUN).images)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_image_to_image(name: str, theirs: Path, folder: Any) -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionImg2ImgPipeline

    model, strength = loaded(theirs / name), 0.5
    clean = noise(4, 16, seed=2)
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    schedule = model.denoiser.schedule
    grid = make_grid(schedule, STEPS, "sd3" if name == "sd3" else "ddim").truncate(round(STEPS * (1 - strength)))
    given, null = model.conditioner({"text": PROMPTS}), model.conditioner.null(2)
    first = grid[0]
    ours = solve(model, given, null, first.alpha.float() * clean + first.sigma.float() * drawn, grid)
    cls = StableDiffusion3Img2ImgPipeline if name == "sd3" else StableDiffusionImg2ImgPipeline
    other = pipeline(folder(name), cls)
    size = {"height": 32, "width": 32} if name == "sd3" else {}
    generator = torch.Generator().manual_seed(3)
    result = other(PROMPTS, image=clean, strength=strength, generator=generator, **size, **RUN)
    assert_close(ours, result.images)


@torch.no_grad()
def test_inpainting(theirs: Path, folder: Any) -> None:
    model, x = loaded(theirs / "inpaint"), noise(4, 8)
    image = noise(3, 64, seed=2).clamp(-1, 1)
    mask = torch.zeros(2, 1, 64, 64)
    mask[:, :, 16:48, 24:64] = 1
    fields = {"image": image, "repaint_mask": mask}
    given = model.conditioner({"text": PROMPTS, **fields})
    null = model.conditioner({"text": PROMPTS, **fields}, absent=["text"])
    assert given.concat is not None
    result = pipeline(folder("inpaint"))(
        PROMPTS,
        image=image,
        mask_image=mask,
        # Theirs draws a sample of the posterior; ours takes its mode.
        masked_image_latents=given.concat[:, 1:],
        latents=x,
        height=64,
        width=64,
        strength=1.0,
        **RUN,
    )
    assert_close(solve(model, given, null, x), result.images)


@torch.no_grad()
def test_upscaling(theirs: Path, folder: Any) -> None:
    model, level = loaded(theirs / "upscale"), 20
    picture = noise(3, 16, seed=2).clamp(-1, 1)
    generator = torch.Generator().manual_seed(5)
    drawn, x = torch.randn(picture.shape, generator=generator), noise(4, 16)
    noised = with_noise(picture, torch.full((2,), level), drawn, IMAGE_NOISE)
    batch = {"text": PROMPTS, "low_resolution": noised}
    given, null = model.conditioner(batch), model.conditioner(batch, absent=["text"])
    other = pipeline(folder("upscale"))
    result = other(
        PROMPTS, image=picture, noise_level=level, latents=x, generator=torch.Generator().manual_seed(5), **RUN
    )
    assert_close(solve(model, given, null, x), result.images)


def _their_noise(monkeypatch: pytest.MonkeyPatch, module: str, x: torch.Tensor) -> None:
    """For pipelines that take no latents."""
    import importlib

    monkeypatch.setattr(importlib.import_module(module), "randn_tensor", lambda *args, **options: x.clone())


def _decoded(model: Any, latents: torch.Tensor) -> np.ndarray:
    """(B, H, W, C) in [0, 1]."""
    return (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def test_classes_in_dit(theirs: Path, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers computes the frequencies of DiT's time features a little differently; see diffusers_transformers.py."""
    model, x = loaded(theirs / "dit"), noise(4, 8)
    _their_noise(monkeypatch, "diffusers.pipelines.dit.pipeline_dit", x)
    given = model.conditioner({"class_label": torch.tensor([3, 999])})
    other = pipeline(folder("dit"))
    for block in other.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    result = other([3, 999], num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np").images
    grid = make_grid(model.denoiser.schedule, STEPS, "leading", final="clean")
    denoised = solve(model, given, model.conditioner.null(2), x, grid)
    assert np.abs(_decoded(model, denoised) - result).max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["ldm", "ldm_updown"])
def test_unconditional(name: str, theirs: Path, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = loaded(theirs / name), noise(3, 16)
    _their_noise(
        monkeypatch, "diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond", x
    )
    result = pipeline(folder(name))(batch_size=2, num_inference_steps=STEPS, output_type="np").images
    assert np.abs(_decoded(model, solve(model, Conditioning(), None, x)) - result).max() < 1e-3


@torch.no_grad()
def test_super_resolution(theirs: Path, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = loaded(theirs / "ldm_upscale"), noise(3, 16)
    picture = noise(3, 16, seed=2).clamp(-1, 1)
    _their_noise(monkeypatch, "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution", x)
    result = pipeline(folder("ldm_upscale"))(picture, num_inference_steps=STEPS, output_type="np").images
    given = model.conditioner({"low_resolution": picture})
    assert np.abs(_decoded(model, solve(model, given, None, x)) - result).max() < 1e-3


@torch.no_grad()
def test_the_papers_text_tower(theirs: Path, folder: Any) -> None:
    model, x = loaded(theirs / "ldm_text"), noise(4, 8)
    other = pipeline(folder("ldm_text"))
    result = other(
        PROMPTS, height=64, width=64, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=x, output_type="np"
    ).images
    denoised = solve(model, model.conditioner({"text": PROMPTS}), model.conditioner.null(2), x)
    assert np.abs(_decoded(model, denoised) - result).max() < 1e-3
