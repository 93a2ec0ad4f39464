"""`Denoiser`: with a network that answers exactly, every prediction type on every schedule gives the exact x0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian_mixture import GaussianMixture
from torch import Tensor, nn

from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.levels import NoiseLevel
from darkroom.diffusion.prediction import PREDICTION_TYPES, edm_scalings, epsilon_from_x0
from darkroom.diffusion.schedules import NoiseSchedule, ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError

SIGMA_DATA = 0.8
KINDS = ("ldm", "cosine", "flow", "edm")


class ExactNetwork(nn.Module):
    """Answers in the given type from (x_in, time) alone: it finds the level by inverting the schedule's time."""

    def __init__(self, mixture: GaussianMixture, schedule: NoiseSchedule, prediction_type: str) -> None:
        super().__init__()
        self.mixture, self.schedule, self.prediction_type = mixture, schedule, prediction_type

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning | None) -> Tensor:
        assert time.shape == (x.shape[0],) and time.dtype == x.dtype
        level = self.schedule.level(time)
        at = level.like(x)
        if self.prediction_type == "edm":
            x = x / edm_scalings(at, SIGMA_DATA)[2]
        x0 = self.mixture.x0(x, level)
        epsilon = epsilon_from_x0(x, x0, level)
        if self.prediction_type == "edm":
            c_skip, c_out, _, _ = edm_scalings(at, SIGMA_DATA)
            return (x0 - c_skip * x) / c_out
        return {
            "epsilon": epsilon,
            "x0": x0,
            "v": at.alpha * epsilon - at.sigma * x0,
            "velocity": epsilon - x0,
        }[self.prediction_type]


class Recorder(nn.Module):
    """Keeps what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.targets: list[Tensor | None] = []
        self.calls: list[tuple[Tensor, Tensor, Conditioning | None]] = []

    def forward(
        self, x: Tensor, time: Tensor, conditioning: Conditioning | None, target_time: Tensor | None = None
    ) -> Tensor:
        self.targets.append(target_time)
        self.calls.append((x, time, conditioning))
        return self.weight * x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_exact_x0(kind: str, prediction_type: str, gaussian_mixture: GaussianMixture) -> None:
    if (kind, prediction_type) == ("flow", "epsilon"):
        return
    schedule = make_schedule(ScheduleConfig(kind=kind))  # type: ignore[arg-type]
    network = ExactNetwork(gaussian_mixture, schedule, prediction_type)
    denoiser = Denoiser(network, schedule, prediction_type, sigma_data=SIGMA_DATA)
    low, high = schedule.time_range
    levels = schedule.level(torch.linspace(low, high, 7, dtype=torch.float64)[1:-1])
    x = (
        torch.randn(5, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * levels.like(torch.zeros(5, 2, 1, 1, dtype=torch.float64)).sigma
    )
    expected = gaussian_mixture.x0(x, levels)
    # The division of epsilon by alpha magnifies rounding where x is nearly all noise.
    bound = 1e-11 * float((levels.sigma / levels.alpha).max() + 1)
    torch.testing.assert_close(denoiser(x, levels), expected, rtol=0, atol=bound)
    for i in range(5):
        one = NoiseLevel(levels.alpha[i], levels.sigma[i], levels.time[i])
        torch.testing.assert_close(denoiser(x[i : i + 1], one), expected[i : i + 1], rtol=0, atol=bound)


def test_what_the_network_is_given() -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = Conditioning(context=torch.randn(3, 5, 6), label=torch.arange(3))
    for kind, prediction_type, time, expected_time in (
        ("ldm", "epsilon", 501.0, 501.0),
        ("flow", "velocity", 250.0, 250.0),
        ("edm", "edm", 0.25, 0.25),
    ):
        schedule = make_schedule(ScheduleConfig(kind=kind))  # type: ignore[arg-type]
        network = Recorder()
        denoiser = Denoiser(network, schedule, prediction_type)
        level = schedule.level(time)
        denoiser(x, level, conditioning)
        ((given, given_time, given_conditioning),) = network.calls
        assert given_time.tolist() == [expected_time] * 3 and given_time.dtype == torch.float32
        assert given_conditioning is conditioning
        factor = 1.0 if kind != "edm" else (float(level.sigma) ** 2 + 0.5**2) ** -0.5
        torch.testing.assert_close(given, factor * x)


def test_half_precision_network_and_float32_conversions() -> None:
    """The network runs in bfloat16; the conversion from its output does not."""
    schedule = make_schedule(ScheduleConfig())
    network = Recorder(torch.bfloat16)
    denoiser = Denoiser(network, schedule, "epsilon")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = Conditioning(context=torch.randn(2, 5, 6), context_mask=torch.ones(2, 5, dtype=torch.bool))
    level = schedule.level(900.0)
    prediction = denoiser.predict(x, level, conditioning)
    given, time, given_conditioning = network.calls[0]
    assert given.dtype == torch.bfloat16 and time.dtype == torch.float32
    assert given_conditioning is not None and given_conditioning.context is not None
    assert given_conditioning.context.dtype == torch.bfloat16 and given_conditioning.context_mask.dtype == torch.bool
    assert prediction.raw.dtype == prediction.x0.dtype == torch.float32
    at = level.like(x)
    torch.testing.assert_close(prediction.x0, (x - at.sigma * prediction.raw) / at.alpha)
    # x itself in half precision is widened before anything is divided.
    assert denoiser(x.half(), level).dtype == torch.float32
    assert Denoiser(Recorder(torch.float64), schedule)(x.double(), level).dtype == torch.float64


@pytest.mark.parametrize("prediction_type", [p for p in PREDICTION_TYPES if p != "epsilon"])
def test_finite_at_both_ends(prediction_type: str) -> None:
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for schedule in (
        make_schedule(ScheduleConfig(kind="flow")),
        make_schedule(ScheduleConfig(zero_terminal_snr=True)),
        make_schedule(ScheduleConfig(kind="edm")),
    ):
        denoiser = Denoiser(Recorder(), schedule, prediction_type)
        for level in (schedule.level(schedule.time_range[1]), schedule.clean()):
            prediction = denoiser.predict(x, level)
            assert prediction.x0.isfinite().all() and prediction.raw.isfinite().all()
            assert denoiser.network.calls[-1][1].isfinite().all()  # type: ignore[union-attr, index]
            # At sigma = 0 x is the answer, whatever the network says (x0 prediction apart).
            if float(level.sigma) == 0 and prediction_type != "x0":
                torch.testing.assert_close(prediction.x0, x)


def test_epsilon_is_refused_where_it_is_undefined() -> None:
    for config in (ScheduleConfig(zero_terminal_snr=True), ScheduleConfig(kind="flow")):
        with pytest.raises(DarkroomError, match="velocity"):
            Denoiser(Recorder(), make_schedule(config), "epsilon")
    with pytest.raises(DarkroomError, match="nonsense"):
        Denoiser(Recorder(), make_schedule(ScheduleConfig()), "nonsense")


def test_sigma_data_lives_in_the_schedule() -> None:
    schedule = make_schedule(ScheduleConfig(kind="edm", sigma_data=0.7))
    assert Denoiser(Recorder(), schedule, "edm").sigma_data == 0.7
    assert Denoiser(Recorder(), schedule, "edm", sigma_data=0.3).sigma_data == 0.3


def test_the_target_time_reaches_the_network() -> None:
    """As (B,) in the dtype of x, beside the time; without one the network is called as ever."""
    schedule, network, x = make_schedule(ScheduleConfig(kind="flow")), Recorder(), torch.zeros(2, 4, 8, 8)
    denoiser = Denoiser(network, schedule, "velocity")
    level = schedule.level(800.0)
    denoiser(x, level)
    denoiser(x, replace(level, target_time=torch.tensor(250.0, dtype=torch.float64)))
    denoiser(x, replace(level, target_time=torch.tensor([0.0, 250.0])))
    none, scalar, each = network.targets
    assert none is None and scalar is not None and each is not None
    assert scalar.tolist() == [250.0, 250.0] and scalar.dtype == x.dtype and each.tolist() == [0.0, 250.0]
