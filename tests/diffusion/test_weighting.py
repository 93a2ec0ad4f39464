"""Loss weights: each is checked against its definition for the error of x0, whatever the network predicts."""

from __future__ import annotations

import pytest
import torch
from parity_data import load_case
from torch import Tensor

from darkroom.denoiser import Denoiser
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.prediction import PREDICTION_TYPES
from darkroom.diffusion.schedules import DDPMSchedule, NoiseSchedule, ScheduleConfig, make_schedule
from darkroom.diffusion.weighting import LOSS_WEIGHTINGS, loss_weight
from darkroom.errors import DarkroomError

SIGMA_DATA = 0.6


def x0_error_factor(schedule: NoiseSchedule, level: NoiseLevel, prediction_type: str) -> Tensor:
    """|x0 error|^2 / |raw error|^2, measured: x0 is affine in the raw output."""
    denoiser = Denoiser(torch.nn.Identity(), schedule, prediction_type, sigma_data=SIGMA_DATA)
    x = torch.zeros(level.alpha.shape[0], 1, dtype=torch.float64)
    slope = denoiser.x0_from_raw(x + 1, x, level) - denoiser.x0_from_raw(x, x, level)
    return slope[:, 0] ** 2


@pytest.mark.parametrize("kind", ["ldm", "flow", "edm"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_one_name_is_one_objective(kind: str, prediction_type: str) -> None:
    if (kind, prediction_type) == ("flow", "epsilon"):
        return
    schedule = make_schedule(ScheduleConfig(kind=kind))  # type: ignore[arg-type]
    low, high = schedule.finite_half_log_snr_range
    level = schedule.level_at_half_log_snr(torch.linspace(low, high, 9, dtype=torch.float64))
    less = schedule.level_at_half_log_snr(torch.linspace(low, high, 9, dtype=torch.float64) + 0.01)
    k2 = x0_error_factor(schedule, level, prediction_type)
    snr = torch.exp(2 * level.half_log_snr)
    ratio = level.sigma / level.alpha
    definitions = {
        "x0": torch.ones_like(snr),
        "snr": snr,
        "min_snr": snr.clamp(max=3.0),
        "edm": (ratio**2 + SIGMA_DATA**2) / (ratio * SIGMA_DATA) ** 2,
        "vlb": 0.5 * (torch.exp(2 * less.half_log_snr) - snr),
    }
    assert set(definitions) | {"uniform"} == set(LOSS_WEIGHTINGS)
    for name, weight in definitions.items():
        ours = loss_weight(name, level, prediction_type, min_snr_gamma=3.0, sigma_data=SIGMA_DATA, previous=less)
        torch.testing.assert_close(ours, weight * k2, rtol=1e-8, atol=0)
    assert loss_weight("uniform", level, prediction_type).tolist() == [1.0] * 9


def test_known_identities() -> None:
    level = make_schedule(ScheduleConfig()).level(torch.arange(0, 1000, 50))
    snr = torch.exp(2 * level.half_log_snr)
    torch.testing.assert_close(loss_weight("snr", level, "epsilon"), torch.ones_like(snr))
    # Hang et al. 2023, section 3.4: min(SNR, gamma)/SNR for epsilon, min(SNR, gamma)/(SNR + 1) for v.
    torch.testing.assert_close(loss_weight("min_snr", level, "epsilon"), snr.clamp(max=5) / snr)
    torch.testing.assert_close(loss_weight("min_snr", level, "v"), snr.clamp(max=5) / (snr + 1))
    edm = make_schedule(ScheduleConfig(kind="edm")).level(torch.linspace(-1.5, 1.0, 7, dtype=torch.float64))
    torch.testing.assert_close(loss_weight("edm", edm, "edm"), torch.ones(7, dtype=torch.float64))


def test_min_snr_is_finite_at_both_ends() -> None:
    for alpha, sigma in ((0.0, 1.0), (1.0, 0.0)):
        level = NoiseLevel(*(torch.tensor([v], dtype=torch.float64) for v in (alpha, sigma, 0.0)))
        for prediction_type in PREDICTION_TYPES:
            assert loss_weight("min_snr", level, prediction_type).isfinite().all()


def test_vlb_weights_are_the_official_ones() -> None:
    case = load_case("schedules_ldm", "buffers_linear_ldm")
    schedule = make_schedule(ScheduleConfig(beta_start=0.0015, beta_end=0.0195))
    assert isinstance(schedule, DDPMSchedule)
    time = torch.arange(1, 1000)
    ours = loss_weight("vlb", schedule.level(time), "epsilon", previous=schedule.level(time - 1))
    torch.testing.assert_close(ours.float(), case.output("lvlb_weights")[1:], rtol=1e-4, atol=0)


def test_bad_requests_are_one_line() -> None:
    level = make_schedule(ScheduleConfig()).level(torch.arange(3))
    for kind in ("nonsense", "vlb"):
        with pytest.raises(DarkroomError):
            loss_weight(kind, level, "epsilon")
