"""The recipes of super-resolution and deblurring: sizes of their networks, and what evaluation makes of the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_facts import Facts
from paper_models import parts_of
from torch import nn

import darkroom
from darkroom.data.degradations import LowResolution
from darkroom.data.sources import DataConfig, open_dataset
from darkroom.errors import DarkroomError
from darkroom.eval_places import with_derived_fields
from darkroom.first_stage.autoencoder import AutoencoderConfig
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.train_job import train
from darkroom.training.recipe import find_recipe, read_recipe, resolve

NAMES = ("clothing-sr", "clothing-sr-bsr", "clothing-deblur", "clothing-sr-f1", "clothing-sr-vq")
F4 = AutoencoderConfig(channels=8, channel_mult=(1, 1, 1), norm_groups=8, z_channels=4, embed_dim=4)
MEGABYTES = 6e6  # of a bundled model in float16, without its first stage


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_networks_are_small_enough_to_be_shipped_and_equal_where_they_are_compared() -> None:
    sizes = {}
    for name in NAMES:
        recipe = resolve(read_recipe(find_recipe(name)))
        rule = recipe.data.low_resolution
        assert rule is not None
        with torch.device("meta"):
            _, denoiser, conditioner = parts_of(recipe, Facts(low_resolution_factor=rule.factor), F4)
        sizes[name] = count(denoiser)
        assert count(conditioner) == 0 and 2 * sizes[name] < MEGABYTES
    compared = [sizes[name] for name in ("clothing-sr", "clothing-sr-f1", "clothing-sr-vq")]
    assert max(compared) < 1.01 * min(compared)


@pytest.mark.parametrize("name", ["clothing-sr-bsr", "clothing-deblur", "clothing-sr-f1"])
def test_a_model_is_evaluated_with_the_damage_that_it_was_trained_with(name: str, tmp_path: Path) -> None:
    few: dict[str, Any] = {
        "data.source": "shapes",
        "data.count": 12,
        "data.size": 32,
        "data.flip": False,
        "data.validation": 0.1,
        "steps": 1,
        "batch_size": 2,
        "evaluate.samples": 2,
        "evaluate.steps": 1,
        "denoiser.network.model_channels": 32,
        "first_stage": None if name == "clothing-sr-f1" else {"name": "emoji"},
    }
    run = train(name, tmp_path / "run", overrides=few, quiet=True)
    assert run.model is not None
    model = darkroom.load(run.model)
    assert isinstance(model, LatentDiffusion)
    plain = open_dataset(DataConfig(count=4, size=32))
    rule = with_derived_fields(plain, model).config.low_resolution
    assert rule == resolve(read_recipe(find_recipe(name))).data.low_resolution
    model.info.pop("data")
    if name == "clothing-deblur":
        with pytest.raises(DarkroomError, match="sharpens blurred pictures"):
            with_derived_fields(plain, model)
    else:
        assert with_derived_fields(plain, model).config.low_resolution == LowResolution(4)
