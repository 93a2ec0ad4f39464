"""The denoising loss against closed forms, and against the losses of the official checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.levels import add_noise
from darkroom.diffusion.prediction import PREDICTION_TYPES
from darkroom.diffusion.schedules import ScheduleConfig, make_schedule
from darkroom.diffusion.time_sampling import sample_time
from darkroom.errors import DarkroomError
from darkroom.objective import ObjectiveConfig, denoising_loss


class Constant(nn.Module):
    """Answers with a number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
        return self.value.expand(x.shape)


def some(seed: int) -> Tensor:
    return torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_closed_forms_of_a_constant_network() -> None:
    x0, noise = some(1), some(2)
    mean = lambda t: t.flatten(1).mean(1)  # noqa: E731
    for kind, prediction_type, target in (
        ("ldm", "epsilon", noise),
        ("ldm", "x0", x0),
        ("flow", "velocity", noise - x0),
    ):
        schedule = make_schedule(ScheduleConfig(kind=kind))  # type: ignore[arg-type]
        level = schedule.level(torch.linspace(50, 950, 6))
        loss = denoising_loss(
            Denoiser(Constant(0.25), schedule, prediction_type), x0, noise, level, None, ObjectiveConfig()
        )
        torch.testing.assert_close(loss, mean((target - 0.25) ** 2))
        assert loss.shape == (6,)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", ["x0", "snr", "min_snr", "edm", "vlb"])
def test_one_weighting_is_one_loss(prediction_type: str, weighting: str) -> None:
    """Networks of all types that mean the same x0 have the same loss: weight(SNR) * |x0 - estimate|^2."""
    schedule = make_schedule(ScheduleConfig())
    level = schedule.level(torch.tensor([1, 100, 300, 500, 800, 999]))
    x0, noise, estimate = some(1), some(2), some(3)
    x = add_noise(x0, noise, level)
    at = level.like(x)
    # What a network that believes in `estimate` answers.
    implied_noise = (x - at.alpha * estimate) / at.sigma
    helper = Denoiser(Constant(0.0), schedule, prediction_type)
    answer = helper.target(estimate, implied_noise, level)

    class Believer(nn.Module):
        def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
            return answer

    config = ObjectiveConfig(loss_weighting=weighting, min_snr_gamma=2.0)  # type: ignore[arg-type]
    loss = denoising_loss(Denoiser(Believer(), schedule, prediction_type), x0, noise, level, None, config)
    snr = (level.alpha / level.sigma) ** 2
    less = schedule.level(level.time - 1)
    weight = {
        "x0": torch.ones_like(snr),
        "snr": snr,
        "min_snr": snr.clamp(max=2.0),
        "edm": snr + 1 / 0.5**2,
        "vlb": 0.5 * ((less.alpha / less.sigma) ** 2 - snr),
    }[weighting]
    torch.testing.assert_close(loss, weight * (estimate - x0).square().flatten(1).mean(1), rtol=1e-7, atol=1e-10)


def test_vlb_at_time_zero_takes_the_weight_of_time_one() -> None:
    schedule = make_schedule(ScheduleConfig())
    denoiser = Denoiser(Constant(0.0), schedule)
    config = ObjectiveConfig(loss_weighting="vlb")
    x0, noise = some(1), some(2)
    zero, one = (denoising_loss(denoiser, x0, noise, schedule.level(torch.full((6,), t)), None, config) for t in (0, 1))
    torch.testing.assert_close(zero, one)
    flow = make_schedule(ScheduleConfig(kind="flow"))
    with pytest.raises(DarkroomError, match="vlb"):
        denoising_loss(Denoiser(Constant(0.0), flow, "velocity"), x0, noise, flow.level(torch.ones(6)), None, config)


@pytest.mark.parametrize("kind,prediction_type", [("ldm", "v"), ("flow", "velocity"), ("edm", "edm")])
def test_gradients_flow_and_stay_finite_in_float32(kind: str, prediction_type: str) -> None:
    schedule = make_schedule(ScheduleConfig(kind=kind))  # type: ignore[arg-type]
    denoiser = Denoiser(Constant(0.1).float(), schedule, prediction_type)
    generator = torch.Generator().manual_seed(0)
    for sampling in ("uniform", "uniform_continuous", "logit_normal", "edm"):
        config = ObjectiveConfig(time_sampling=sampling, loss_weighting="min_snr")  # type: ignore[arg-type]
        level = schedule.level(sample_time(config, schedule, 6, generator))
        loss = denoising_loss(denoiser, some(1).float(), some(2).float(), level, None, config)
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss.mean(), denoiser.network.value)  # type: ignore[arg-type]
        assert gradient.isfinite() and loss.isfinite().all()
