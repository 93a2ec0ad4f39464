"""Schedules and scheduler configs: diffusers' own classes compute the same noise, and both ways give back the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from darkroom.config import from_dict
from darkroom.diffusion.schedules import DDPMSchedule, FlowSchedule, ScheduleConfig, make_schedule
from darkroom.errors import DarkroomError
from darkroom.interop.diffusers_scheduler import FLOW_CLASS, READ_AS, SOLVERS, from_scheduler, to_scheduler

TABLES: list[dict[str, Any]] = [
    {"kind": "ldm", "timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195},
    {"kind": "linear", "timesteps": 400, "beta_start": 0.0001, "beta_end": 0.02},
    {"kind": "cosine", "timesteps": 1000},
    {"kind": "sqrt", "timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02},
    {"kind": "ldm", "timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "zero_terminal_snr": True},
]


def theirs(config: dict[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, config["_class_name"]).from_config(config)


@pytest.mark.parametrize("schedule", TABLES)
@pytest.mark.parametrize("solver", [*SOLVERS, "dpm++2m"])
def test_tables(schedule: dict[str, Any], solver: str) -> None:
    zero = schedule.get("zero_terminal_snr", False)
    prediction = "v" if zero else "epsilon"
    name, config = to_scheduler({"schedule": schedule, "prediction_type": prediction}, solver)
    made = make_schedule(from_dict(ScheduleConfig, schedule, "schedule"))
    assert isinstance(made, DDPMSchedule)
    other = theirs(config)
    assert type(other).__name__ == name == config["_class_name"]
    # Euler's class keeps a little signal at the end, where its sigma would be infinite.
    assert torch.allclose(other.alphas_cumprod.double(), made.alphas_cumprod, rtol=2e-4, atol=1e-6)
    again, said, method = from_scheduler(config, "here")
    assert said == prediction and SOLVERS[method] == name
    assert make_schedule(from_dict(ScheduleConfig, again, "schedule")).config == made.config


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_predictions(prediction: str) -> None:
    for solver in SOLVERS:
        _, config = to_scheduler({"prediction_type": prediction}, solver)
        assert from_scheduler(config, "here")[1] == prediction
        assert theirs(config).config.prediction_type == config["prediction_type"]


def test_flow() -> None:
    flow = {"schedule": {"kind": "flow", "timesteps": 1000, "shift": 3.0}, "prediction_type": "velocity"}
    name, config = to_scheduler(flow)
    assert name == FLOW_CLASS and from_scheduler(config, "here") == (flow["schedule"], "velocity", "euler")
    other = theirs(config)
    made = make_schedule(from_dict(ScheduleConfig, flow["schedule"], "schedule"))
    assert isinstance(made, FlowSchedule)
    other.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    wanted = made.config.shift * torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert torch.allclose(
        other.sigmas, wanted / (1 + (made.config.shift - 1) * torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    )
    assert torch.allclose(other.timesteps.double(), made.level(other.sigmas[:4].double() * 1000).time)


def test_a_shift_by_size() -> None:
    """diffusers counts tokens of patch 2 where we count places of the latent."""
    rule = {
        "kind": "flow",
        "timesteps": 1000,
        "shift": 1.5,
        "shift_end": 3.0,
        "shift_rule": "linear",
        "shift_places": [1024, 16384],
    }
    _, config = to_scheduler({"schedule": rule, "prediction_type": "velocity"}, patch=2)
    assert (config["base_image_seq_len"], config["max_image_seq_len"]) == (256, 4096)
    assert from_scheduler(config, "here", patch=2)[0] == rule


@pytest.mark.parametrize("name", READ_AS)
def test_other_methods_are_read(name: str) -> None:
    schedule, prediction, solver = from_scheduler({"_class_name": name, "beta_schedule": "scaled_linear"}, "here")
    assert schedule == {"kind": "ldm", "timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02}
    assert (prediction, solver) == ("epsilon", READ_AS[name])


def test_flows_of_multistep_methods() -> None:
    config = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0}
    assert from_scheduler(config, "here")[:2] == ({"kind": "flow", "timesteps": 1000, "shift": 5.0}, "velocity")


@pytest.mark.parametrize(
    ("denoiser", "named"),
    [
        ({"schedule": {"kind": "flow"}, "prediction_type": "x0"}, "velocities only"),
        ({"schedule": {"kind": "edm"}, "prediction_type": "edm"}, "'edm'"),
        ({"prediction_type": "velocity"}, "'velocity'"),
        ({"schedule": {"kind": "cosine", "cosine_offset": 0.1}}, "offset 0.008"),
        ({"schedule": {"kind": "flow", "shift_rule": "sqrt"}, "prediction_type": "velocity"}, '"sqrt"'),
    ],
)
def test_what_they_lack_is_named(denoiser: dict[str, Any], named: str) -> None:
    with pytest.raises(DarkroomError, match=named):
        to_scheduler(denoiser)
