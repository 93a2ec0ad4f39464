"""The schedulers of diffusers, run beside our solvers on a Gaussian mixture: the ones without golden vectors."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from gaussian_mixture import GaussianMixture
from torch import Tensor

from darkroom.diffusion.grids import Grid, grid_from_half_log_snr, make_grid
from darkroom.diffusion.prediction import epsilon_from_x0
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.solvers import SOLVERS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, inside diffusers

SD = make_schedule(ScheduleConfig())
FLOW = make_schedule(ScheduleConfig(kind="flow", shift=3.0))
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def draws(i: int) -> Tensor:
    return torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(100 + i))


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws inside of `step`: the i-th draw becomes ours."""
    count = iter(range(1000))

    def randn(shape: Any, **options: Any) -> Tensor:
        return draws(next(count)).reshape(shape)

    for name in ("lcm", "k_dpm_2_ancestral_discrete"):
        module = getattr(diffusers.schedulers, f"scheduling_{name}")
        monkeypatch.setattr(module, "randn_tensor", randn)


def run_theirs(scheduler: Any, model: Any, x: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, time, scheduler), time, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm(steps: int, gaussian_mixture: GaussianMixture, same_noise: None) -> None:
    grid = make_grid(SD, steps, "lcm")
    scheduler = diffusers.LCMScheduler(**TABLE, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == grid.levels.time[:-1].tolist()

    def epsilon(x: Tensor, time: Tensor, _: Any) -> Tensor:
        level = SD.level(float(time))
        return epsilon_from_x0(x, gaussian_mixture.x0(x, level), level)

    theirs = run_theirs(scheduler, epsilon, draws(99), steps)
    ours = SOLVERS["lcm"](gaussian_mixture.x0, draws(99), grid, draws, time_scaling=10.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("name", ["dpm2", "dpm2_ancestral"])
def test_dpm2(name: str, steps: int, gaussian_mixture: GaussianMixture, same_noise: None) -> None:
    kind = {"dpm2": "KDPM2DiscreteScheduler", "dpm2_ancestral": "KDPM2AncestralDiscreteScheduler"}[name]
    scheduler = getattr(diffusers, kind)(**TABLE)
    scheduler.set_timesteps(steps)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])[: steps + 1]
    assert float(sigmas[-1]) == 0

    def epsilon(scaled: Tensor, time: Tensor, scheduler: Any) -> Tensor:
        index = scheduler.step_index
        if not scheduler.state_in_first_order:
            sigma = scheduler.sigmas_interpol[index - 1 if name == "dpm2_ancestral" else index]
        else:
            sigma = scheduler.sigmas[index]
        level = SD.level_at_half_log_snr(-torch.log(sigma.double()))
        return epsilon_from_x0(scaled, gaussian_mixture.x0(scaled, level), level)

    theirs = run_theirs(scheduler, epsilon, draws(99), steps)
    grid = grid_from_half_log_snr(-sigmas[:-1].double().log(), SD, append_clean=True)
    x = draws(99) * float(scheduler.init_noise_sigma) * float(grid[0].alpha)
    ours = SOLVERS[name](gaussian_mixture.x0, x, grid, draws)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


FLOWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0,
                "prediction_type": "flow_prediction"}, {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0,
              "prediction_type": "flow_prediction"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("steps", [6, 12])
@pytest.mark.parametrize("name", FLOWS)
def test_rectified_flow(name: str, steps: int, gaussian_mixture: GaussianMixture) -> None:
    kind, theirs_options, options = FLOWS[name]
    scheduler = getattr(diffusers, kind)(**theirs_options)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()

    def velocity(x: Tensor, time: Tensor, scheduler: Any) -> Tensor:
        sigma = sigmas[scheduler.step_index or 0]
        return (x - gaussian_mixture.x0(x, FLOW.level(1000 * sigma))) / float(sigma)

    theirs = run_theirs(scheduler, velocity, draws(99), steps)
    grid = Grid(FLOW.level(1000 * sigmas), FLOW)
    ours = SOLVERS[name](gaussian_mixture.x0, draws(99), grid, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
