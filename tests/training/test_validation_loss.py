"""The denoiser's validation loss: every time as often as any other, and one number whatever the batches are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from darkroom.objective import ObjectiveConfig
from darkroom.training import denoiser_step
from darkroom.training.denoiser_step import DenoiserStep
from darkroom.training.loop import fixed_times


def looked_at(images: int, batch_size: int) -> tuple[Counter[float], float, DenoiserStep]:
    """How often each time was drawn, and the loss."""
    model = tiny_model("class")
    step = DenoiserStep(model.denoiser, model.conditioner, None, ObjectiveConfig())
    seen: list[torch.Tensor] = []
    network: Any = model.denoiser.network
    hook = network.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    all_images = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [
        {"image": part, "class_label": torch.zeros(len(part), dtype=torch.int64)}
        for part in all_images.split(batch_size)
    ]
    with torch.no_grad():
        loss = step.validation_loss(batches, seed=5)["validation_loss"]
    hook.remove()
    return Counter(round(t, 3) for t in torch.cat(seen).tolist()), loss, step


@pytest.mark.parametrize(("images", "each"), [(256, 32), (250, 63), (40, 35), (3, 3), (1, 1)])
def test_every_time_is_looked_at_as_often(images: int, each: int) -> None:
    times, loss, step = looked_at(images, 32)
    assert len(times) == 8 and loss > 0
    assert sorted(times) == pytest.approx(sorted(fixed_times(*step.denoiser.schedule.time_range, 8).tolist()), abs=1)
    assert max(times.values()) - min(times.values()) <= 1 and abs(max(times.values()) - each) <= 1
    assert sum(times.values()) == images * min(8, -(-denoiser_step.VALIDATION_DRAWS // images))


def test_the_same_again() -> None:
    assert looked_at(40, 16)[1] == looked_at(40, 16)[1]


def test_nothing_to_look_at_is_no_number() -> None:
    model = tiny_model("class")
    assert DenoiserStep(model.denoiser, model.conditioner, None, ObjectiveConfig()).validation_loss([], 0) == {}
