"""Golden vectors of Stability's code for SD 2 that are no networks: v-prediction, its sampling, noise augmentation."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from parity_data import case_names, load_case, weights
from torch import Tensor

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.grids import make_grid
from darkroom.diffusion.levels import add_noise
from darkroom.diffusion.prediction import epsilon_from_v, v_target, x0_from_v
from darkroom.diffusion.schedules import DDPMSchedule, ScheduleConfig, make_schedule
from darkroom.guidance import Guided
from darkroom.networks.blocks import timestep_embedding
from darkroom.networks.unet import UNet, UNetConfig
from darkroom.solvers import ddim


def table(args: dict[str, Any], **options: Any) -> DDPMSchedule:
    config = ScheduleConfig(beta_start=args["linear_start"], beta_end=args["linear_end"], **options)
    schedule = make_schedule(config)
    assert isinstance(schedule, DDPMSchedule)
    return schedule


def test_all_cases_are_covered() -> None:
    here = {"low_scale_noise", "unclip_noise_augmentation", "v_prediction", "ddim10_v"}
    networks = {n for n in case_names("unet_sd2") if load_case("unet_sd2", n).spec.get("class") == "UNetModel (SD2)"}
    assert set(case_names("unet_sd2")) == here | networks


def test_v_prediction() -> None:
    case = load_case("unet_sd2", "v_prediction")
    schedule = table(case.args)
    level = schedule.level(case.input("t"))
    x, v = case.input("x_t"), case.input("v")
    case.check("x0", x0_from_v(x, v, level))
    case.check("eps", epsilon_from_v(x, v, level))
    case.check("target", v_target(x, v, level))
    case.check("lvlb_weights", schedule.buffers(prediction_type="v")["lvlb_weights"])


@torch.no_grad()
def test_guided_ddim_of_a_v_model() -> None:
    case = load_case("unet_sd2", "ddim10_v")
    known = {f.name for f in fields(UNetConfig)}
    network = UNet(UNetConfig(**{k: v for k, v in case.args.items() if k in known})).eval()
    network.load_state_dict(weights().make_state_dict(load_case("unet_sd2", "sd2").spec["layout"]), strict=True)
    denoiser = Denoiser(network, table(case.args), "v")
    null = Conditioning(context=case.input("uncond_context"))
    denoise = Guided(denoiser, Conditioning(context=case.input("context")), null, case.args["guidance_scale"])
    visited: list[Tensor] = []
    estimates: list[Tensor] = []

    def callback(step: int, level: object, x: Tensor, x0: Tensor) -> None:
        visited.append(x)
        estimates.append(x0)

    grid = make_grid(denoiser.schedule, case.args["steps"], "ddim")
    final = ddim(denoise, case.input("x_T"), grid, callback=callback, eta=case.args["eta"])
    case.check("x_after_step", torch.stack([*visited[1:], final]), relative=1e-4)
    case.check("pred_x0", torch.stack(estimates), relative=1e-4)


def test_noise_on_the_small_image_of_the_upscaler() -> None:
    case = load_case("unet_sd2", "low_scale_noise")
    level = table(case.args).level(case.input("noise_level"))
    case.check("noised", add_noise(case.input("x"), case.input("noise"), level))


def test_noise_on_the_image_embedding_of_unclip() -> None:
    """Its schedule, squaredcos_cap_v2, is `cosine`; the level is embedded as a time is."""
    case = load_case("unet_sd2", "unclip_noise_augmentation")
    schedule = make_schedule(ScheduleConfig(kind="cosine"))
    assert isinstance(schedule, DDPMSchedule)
    case.check("betas", schedule.betas, atol=1e-6)
    case.check("alphas_cumprod", schedule.alphas_cumprod, atol=1e-6)
    case.check("level_embedding", timestep_embedding(case.input("t"), case.args["timestep_dim"]))
