"""Latent statistics measured again from a latent cache, without encoding a single image."""

from __future__ import annotations

from pathlib import Path

from darkroom.data.latent_cache import cached_moments, is_cache
from darkroom.errors import DarkroomError
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.statistics import LatentStatistics, encoder_fingerprint
from darkroom.model_io import load_first_stage, save


def measure(
    model: str | Path | FirstStage,
    latents: str | Path,
    kind: LatentStatistics = "global",
    output: str | Path | None = None,
) -> FirstStage:
    """The first stage of `model` with shift and scale measured on cached latents; written to `output` if it is given.

    latents: a latent cache, or a run folder that holds one (latents/train). A cache holds what was before shift and
        scale, so it serves any statistics; one that another encoder made is refused.
    kind: "global", "channel" or "std", see `first_stage.statistics`.

    A denoiser knows latents as they were normalised when it was trained: it keeps working with those numbers only, so
    this is for first stages on which denoisers are yet to be trained.
    """
    first_stage = model if isinstance(model, FirstStage) else load_first_stage(model, "cpu")
    place = find_cache(Path(latents))
    found = cached_moments(place, encoder_fingerprint(first_stage.autoencoder))
    first_stage.measure(({"moments": moments} for moments in found), kind)
    if output is not None:
        save(first_stage, output, info={"latents": {"kind": kind}})
    return first_stage


def find_cache(folder: Path) -> Path:
    """The latent cache that a folder is or holds."""
    if not folder.is_dir():
        raise DarkroomError(f"{folder}: no such folder; give a run folder that has trained on latents")
    for place in (folder, folder / "train", folder / "latents" / "train"):
        if is_cache(place):
            return place
    raise DarkroomError(
        f"{folder} holds no latent cache; give a run folder that has trained on latents, or its latents/train"
    )
