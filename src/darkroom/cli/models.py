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
    model = load(name, device=device, adapters=adapters)
    if not isinstance(model, LatentDiffusion):
        raise DarkroomError(f"{name} is a first stage only; {first_stage_alone}")
    return model


def shareable(model: str) -> str:
    """What an image may say about where its model lies: images are posted, so no absolute path goes into them."""
    return "" if Path(model).is_absolute() or model.startswith("~") else model
