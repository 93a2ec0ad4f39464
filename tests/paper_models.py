"""The published configurations as models without numbers, built from the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from data_facts import Facts

from darkroom.build import build_conditioner, build_denoiser, build_first_stage, conditioner_config, denoiser_config
from darkroom.conditioning.conditioner import Conditioner
from darkroom.config import to_dict
from darkroom.denoiser import Denoiser
from darkroom.first_stage.autoencoder import AutoencoderConfig
from darkroom.first_stage.first_stage import FirstStage
from darkroom.training.recipe import Recipe, read_recipe, recipe_names, resolve

NAMES = {name: path for name, path in recipe_names().items() if path.parent.name == "paper"}
RECIPES = {name: resolve(read_recipe(path)) for name, path in NAMES.items()}
MODELS = [name for name, recipe in RECIPES.items() if recipe.steps]
FIRST_STAGES = [name for name in RECIPES if name not in MODELS]
# The first stages that recipes name by the checkpoint that holds them.
HELD = {"sd-v1": "kl-f8", "sdxl": "kl-f8", "sd3": "kl-f8-d16"}


def autoencoder_config(recipe: Recipe) -> AutoencoderConfig:
    """Of the first stage that is trained, or of the one that is given."""
    if recipe.first_stage.train is None:
        name = Path(str(recipe.first_stage.path)).name
        recipe = RECIPES[HELD.get(name, name)]
    assert recipe.first_stage.train is not None and recipe.first_stage.train.autoencoder is not None
    return recipe.first_stage.train.autoencoder


def parts_of(recipe: Recipe, data: Any, autoencoder: AutoencoderConfig) -> tuple[FirstStage, Denoiser, Conditioner]:
    first_stage = build_first_stage(to_dict(autoencoder))
    conditioner = build_conditioner(conditioner_config(recipe.conditioner, data), first_stage)
    config = denoiser_config(recipe.denoiser, {}, first_stage.latent_channels, conditioner)
    return first_stage, build_denoiser(config), conditioner


def on_meta(name: str) -> tuple[FirstStage, Denoiser, Conditioner]:
    recipe = RECIPES[name]
    data = Facts(
        class_names=[f"class {i}" for i in range(1000)],
        texts=["a picture"],
        box_names=[f"thing {i}" for i in range(601)],
        map_names=[f"stuff {i}" for i in range(182)],
        low_resolution_factor=4,
    )
    with torch.device("meta"):
        return parts_of(recipe, data, autoencoder_config(recipe))
