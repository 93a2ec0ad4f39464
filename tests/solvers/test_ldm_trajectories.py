"""The official samplers on the tiny official checkpoints: network, guidance and solver together.

A random network does not denoise and x grows to a deviation near 40, so results are compared relative to their size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ldm_checkpoints import TinyModel
from parity_data import Case, load_case, make_input, weights
from torch import Tensor

from darkroom.diffusion.grids import grid_from_levels, make_grid
from darkroom.diffusion.levels import NoiseLevel, add_noise
from darkroom.first_stage.quantizer import Codebook
from darkroom.guidance import Guided, combine
from darkroom.solvers import ddim, ddpm, plms

RELATIVE = 1e-4


@cache
def model(name: str, which: str) -> TinyModel:
    return TinyModel(name, which)


def guided(case: Case) -> tuple[TinyModel, Guided]:
    tiny = model(case.args["model"], case.args["weights"])
    condition, null = (tiny.condition(case.input(name)) for name in ("class_label", "uncond_label"))
    return tiny, Guided(tiny.denoiser, condition, null, case.args.get("guidance_scale", 1.0))


def check_trajectory(
    case: Case,
    tiny: TinyModel,
    denoise: Guided,
    solver: Any,
    noise: Any = None,
    between: float = RELATIVE,
    **options: Any,
) -> None:
    """Times, x after every step (within `between`), the estimate that each step moved towards, and the result."""
    grid = make_grid(tiny.denoiser.schedule, case.args["steps"], "ddim")
    assert grid.levels.time[:-1].tolist() == case.output("timesteps").tolist()
    visited: list[Tensor] = []
    estimates: list[Tensor] = []

    def callback(step: int, level: NoiseLevel, x: Tensor, x0: Tensor) -> None:
        visited.append(x)
        estimates.append(x0)

    final = solver(denoise, case.input("x_T"), grid, noise, callback=callback, **options)
    visited.append(final)
    if solver is plms:
        # Ours tells what the network said, the official code what it made of it and of what was said before.
        for i in range(grid.steps):
            ratio = float(grid[i + 1].sigma / grid[i].sigma)
            estimates[i] = (visited[i + 1] - ratio * visited[i]) / float(grid[i + 1].alpha - grid[i].alpha * ratio)
    case.check("x_after_step", torch.stack(visited[1:]), relative=between)
    case.check("pred_x0", torch.stack(estimates), relative=RELATIVE)
    case.check("final", final, relative=RELATIVE)


DDIM = ["ddim10_eta0", "ddim10_eta1", "ddim10_eta0_cfg3", "ddim10_eta0.5_cfg1.5_live", "ddim10_eta1_temperature0.5"]


@torch.no_grad()
@pytest.mark.parametrize("name", DDIM)
def test_ddim(name: str) -> None:
    case = load_case("samplers_ldm", name)
    tiny, denoise = guided(case)
    # The official "temperature" is a factor on the noise, which here belongs to the caller.
    temperature = case.args.get("temperature", 1.0)
    shape = tuple(case.input("x_T").shape)
    noise = lambda i: temperature * make_input(4000 + i, shape)  # noqa: E731
    check_trajectory(case, tiny, denoise, ddim, noise, eta=case.args["eta"])
    assert denoise.nfe == (10 if denoise.scale == 1 else 20)


@torch.no_grad()
def test_ddim_with_quantised_estimates() -> None:
    """`quantize_x0`: every estimate is put on the codebook of the VQ first stage."""
    case = load_case("samplers_ldm", "ddim10_quantize_x0")
    tiny, denoise = guided(case)
    checkpoint = load_case("latent_diffusion_tiny", "tiny_cin").spec
    codebook = Codebook(64, 3)
    name = "first_stage_model.quantize.embedding.weight"
    codebook.embedding.weight.copy_(weights().make_state_dict(checkpoint["layout"], checkpoint["derived"])[name])
    # Rounding grows on the way, and dies out at its end: a run in float64 is 2e-3 from both, in steps 7 and 8.
    check_trajectory(case, tiny, denoise, ddim, between=4e-3, refine=codebook)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plms10", "plms10_cfg3"])
def test_plms(name: str) -> None:
    case = load_case("samplers_ldm", name)
    tiny, denoise = guided(case)
    check_trajectory(case, tiny, denoise, plms)
    assert denoise.nfe == 11 * (1 if denoise.scale == 1 else 2)


@torch.no_grad()
def test_guidance_of_one_step() -> None:
    case = load_case("samplers_ldm", "cfg_step")
    tiny, _ = guided(case)
    x, time = case.input("z_t"), case.input("t")
    level = tiny.denoiser.schedule.level(float(time[0]))
    conditional, unconditional = (
        tiny.denoiser.predict(x, level, tiny.condition(case.input(n))).raw for n in ("class_label", "uncond_label")
    )
    case.check("eps_cond", conditional)
    case.check("eps_uncond", unconditional)
    for scale in (0.0, 1.0, 1.5, 7.5):
        # A difference of two outputs times 7.5: their rounding is multiplied too.
        case.check(f"eps_scale_{scale}", combine(conditional, unconditional, scale), atol=2e-5 * max(1.0, scale))
        condition, null = (tiny.condition(case.input(n)) for n in ("class_label", "uncond_label"))
        x0 = Guided(tiny.denoiser, condition, null, scale)(x, level)
        at = level.like(x)
        case.check(f"eps_scale_{scale}", (x - at.alpha * x0) / at.sigma, atol=4e-5 * max(1.0, scale))


@torch.no_grad()
@pytest.mark.parametrize("time", [999, 500, 1, 0])
@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_step(time: int, clip: bool) -> None:
    case = load_case("samplers_ldm", "ddpm_p_sample")
    tiny, denoise = guided(case)
    schedule = tiny.denoiser.schedule
    grid = grid_from_levels([schedule.level(float(time)), schedule.level(float(time - 1))], schedule)
    x = case.input("z_t")
    noise = make_input(4200, tuple(x.shape))

    def clipped(x: Tensor, level: NoiseLevel) -> Tensor:
        x0 = denoise(x, level)
        return x0.clamp(-1, 1) if clip else x0

    case.check(f"t{time}_clip{clip:d}", ddpm(clipped, x, grid, lambda i: noise), relative=RELATIVE)


@torch.no_grad()
def test_image_to_image() -> None:
    """The official script adds the noise of one level more than the first that it decodes."""
    case = load_case("samplers_ldm", "img2img")
    tiny = model("tiny_text2img", "live")
    grid = make_grid(tiny.denoiser.schedule, case.args["steps"], "ddim")
    start = grid.steps - case.args["t_enc"]
    noised = add_noise(case.input("z0"), case.input("noise"), grid[start - 1])
    case.check("noised", noised)
    condition, null = (tiny.condition(case.input(name)) for name in ("tokens", "uncond_tokens"))
    denoise = Guided(tiny.denoiser, condition, null, case.args["guidance_scale"])
    case.check("final", ddim(denoise, noised, grid.truncate(start)), relative=RELATIVE)


@torch.no_grad()
def test_known_region_before_every_step() -> None:
    """The official inpainting is the plain solver with x mixed before each step: one step at a time is enough."""
    case = load_case("samplers_ldm", "ddim10_mask")
    tiny, denoise = guided(case)
    grid = make_grid(tiny.denoiser.schedule, 10, "ddim")
    x, x0, keep = case.input("x_T"), case.input("x0"), (case.input("mask_field") > 0).float()
    for i in range(grid.steps):
        known = add_noise(x0, make_input(4100 + i, tuple(x.shape)), grid[i])
        x = keep * known + (1 - keep) * x
        x = ddim(denoise, x, grid_from_levels([grid[i], grid[i + 1]], grid.schedule))
    case.check("final", x, relative=RELATIVE)
