"""The model that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.errors import DarkroomError
from darkroom.generation_defaults import DEFAULT_MODELS

if TYPE_CHECKING:
    from darkroom.adapters import Given
    from darkroom.latent_diffusion import LatentDiffusion


def open_model(
    name: str | None,
    command: str,
    device: str,
    threads: int | None,
    first_stage_alone: str,
    adapters: Sequence[Given] = (),
) -> LatentDiffusion:
    """The whole model of that name, or the command's own. first_stage_alone: what is said of a first stage."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from darkroom.latent_diffusion import LatentDiffusion
    from darkroom.model_io import load

    name = name or DEFAULT_MODELS[command]
    _check_no_recipe(name)
    model = load(name, device=device, adapters=adapters)
    if not isinstance(model, LatentDiffusion):
        raise DarkroomError(f"{name} is a first stage only; {first_stage_alone}")
    return model


def _check_no_recipe(name: str) -> None:
    """Docs name recipes beside models: raises DarkroomError for the name of one that is no model."""
    from darkroom.model_folder import bundled
    from darkroom.training.recipe import recipe_names

    if name in recipe_names() and name not in bundled() and not Path(name).exists():
        raise DarkroomError(
            f"no model {name!r}: it is a recipe; darkroom train {name} --data FOLDER makes a model of it, in "
            f"runs/{name}, and -m takes that folder"
        )


def shareable(model: str) -> str:
    """What an image may say about where its model lies: images are posted, so no absolute path goes into them."""
    return "" if Path(model).is_absolute() or model.startswith("~") else model
