"""The tiny official checkpoints, one for each kind of condition: network, condition, noising and losses together.

Their first stages, and how a map, a masked picture or a layout becomes a condition, are tested where these live.
"""

from __future__ import annotations

import pytest
import torch
from ldm_checkpoints import TinyModel
from parity_data import case_names

from darkroom.diffusion.levels import add_noise
from darkroom.diffusion.schedules import DDPMSchedule
from darkroom.objective import ObjectiveConfig, denoising_loss

NAMES = case_names("latent_diffusion_tiny")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_outputs(name: str) -> None:
    """Live and averaged weights on the golden's condition."""
    tiny = TinyModel(name)
    case, conditioning = tiny.case, tiny.own_condition()
    if "context" in case.spec["outputs"]:
        assert conditioning.context is not None
        case.check("context", conditioning.context)
    x, time = case.input("z_t"), case.input("t")
    case.check("model_output", tiny.network(x, time, conditioning))
    averaged = "model_output_ema" in case.spec["outputs"]
    assert averaged == case.args.get("use_ema", True)
    if averaged:
        case.check("model_output_ema", TinyModel(name, "EMA").network(x, time, conditioning))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_losses(name: str) -> None:
    """q_sample, L_simple, L_vlb and their sum in the official code at t = 37 and 981."""
    tiny = TinyModel(name)
    case, denoiser, conditioning = tiny.case, tiny.denoiser, tiny.own_condition()
    x0, noise, time = case.input("z_t"), case.input("noise"), case.input("t")
    level = denoiser.schedule.level(time)
    case.check("q_sample", add_noise(x0, noise, level))
    assert isinstance(denoiser.schedule, DDPMSchedule)
    for loss_type in ("l2", "l1"):
        expected = case.output(f"loss_{loss_type}")

        def loss(weighting: str, loss_type: str = loss_type) -> torch.Tensor:
            config = ObjectiveConfig(loss_weighting=weighting, loss_type=loss_type)  # type: ignore[arg-type]
            return denoising_loss(denoiser, x0, noise, level, conditioning, config)

        simple = loss("uniform")
        bound = loss("vlb")
        if denoiser.prediction_type == "x0":
            # The official weight of x0 models is no bound (see DDPMSchedule.buffers): it only comes with checkpoints.
            weights = denoiser.schedule.buffers(prediction_type="x0")["lvlb_weights"]
            bound = weights[time.long()] * simple
        assert float(simple.mean()) == pytest.approx(expected["val/loss_simple"], rel=1e-4)
        assert float(bound.mean()) == pytest.approx(expected["val/loss_vlb"], rel=1e-4)
        total = simple + case.args.get("original_elbo_weight", 0.0) * bound
        assert float(total.mean()) == pytest.approx(expected["val/loss"], rel=1e-4)
