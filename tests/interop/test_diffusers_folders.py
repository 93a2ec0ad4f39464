"""diffusers folders: every kind of pipeline comes in, computes what diffusers computes, and goes out bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import NAMES, write_pipeline
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.diffusion.grids import Grid, make_grid
from darkroom.exchange import convert, export
from darkroom.guidance import Guided
from darkroom.interop.first_stage_files import same_bits
from darkroom.interop.found_model import FoundModel, find_model
from darkroom.interop.tensor_file import open_tensor_file
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.model_io import load
from darkroom.solvers import ddim, euler

PROMPTS = ["the red fox", "a cat"]
STEPS = 4
GUIDANCE = 3.0


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pipelines")
    for name in NAMES:
        write_pipeline(name, place / name)
    return place


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    yield


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


FAMILIES = {
    "sd1": "sd-v1",
    "sd2": "sd-v2-v768",
    "inpaint": "sd-v1-inpainting",
    "upscale": "sd-v2-x4-upscaler",
    "sdxl": "sdxl-base",
    "sd3": "sd3-medium",
    "dit": "dit",
    "ldm": "celeba256",
    "ldm_updown": "lsun_churches256",
    "ldm_upscale": "bsr_sr",
    "ldm_text": "text2img-large",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_comes_back_through_our_folder(name: str, theirs: Path, tmp_path: Path) -> None:
    there = convert(theirs / name, tmp_path / "ours")
    again = convert(tmp_path / "ours", tmp_path / "again", to="diffusers")
    assert there.source.family == FAMILIES[name]  # type: ignore[union-attr]
    assert there.tensors == again.tensors
    before, after = contents(theirs / name), contents(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    index, written = (
        json.loads((place / "model_index.json").read_text()) for place in (theirs / name, tmp_path / "again")
    )
    assert index["_class_name"] == written["_class_name"]
    assert {k for k, v in index.items() if isinstance(v, list) and v[0]} == {
        k for k, v in written.items() if isinstance(v, list) and v[0]
    }


# ------------------------------------------------------------------------------------ the same images in both libraries


def pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    result = DiffusionPipeline.from_pretrained(folder)
    result.set_progress_bar_config(disable=True)
    return result


def noise(channels: int, side: int, count: int = 2) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))


def solve(
    model: LatentDiffusion, given: Conditioning, null: Conditioning | None, x: Tensor, grid: Grid | None = None
) -> Tensor:
    denoise = Guided(model.denoiser, given, null, GUIDANCE if null is not None else 1.0)
    schedule = model.denoiser.schedule
    if schedule.config.kind == "flow":
        return euler(denoise, x, grid or make_grid(schedule, STEPS, "sd3"))
    return ddim(denoise, x, grid or make_grid(schedule, STEPS, "ddim"))


@pytest.fixture(params=["theirs", "exported"])
def folder(request: pytest.FixtureRequest, theirs: Path, tmp_path: Path) -> Any:
    """Where diffusers takes a pipeline from: its own folder, or the one that we write for the model we loaded."""

    def of(name: str) -> Path:
        if request.param == "theirs":
            return theirs / name
        return export(loaded(theirs / name), tmp_path / name, format="diffusers")

    return of


def close(ours: Tensor, other: Tensor) -> None:
    assert ours.shape == other.shape
    assert other.std() > 0.05
    assert float((ours - other).abs().max()) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3"])
def test_text_to_image(name: str, theirs: Path, folder: Any) -> None:
    model, x = loaded(theirs / name), noise(4, 16)
    batch: dict[str, Any] = {"text": PROMPTS}
    null = model.conditioner({"text": [None, None]})
    given = model.conditioner(batch)
    if name == "sdxl":
        sizes = model.conditioner.encoders["sizes"].from_size((32, 32)).expand(2, -1)  # type: ignore[union-attr]
        given = model.conditioner(batch | {"sizes": sizes})
        null = model.conditioner({"text": [None, None], "sizes": sizes}, absent=["text"])
    other = pipeline(folder(name))
    if name != "sd3":
        from diffusers import DDIMScheduler

        other.scheduler = DDIMScheduler.from_config(
            other.scheduler.config,
            set_alpha_to_one=False,
            clip_sample=False,
            steps_offset=1,
            timestep_spacing="leading",
        )
    result = other(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=x,
        output_type="latent",
        height=32,
        width=32,
    ).images
    close(solve(model, given, null, x), result)
