"""Bits per dimension of held-out images, from the variational bound, as numbers per image that stream.

Shapes: B batch, C channels, H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from darkroom.diffusion.grids import Grid, make_grid
from darkroom.diffusion.noise import SeededNoise
from darkroom.diffusion.schedules import DDPMSchedule
from darkroom.evaluation.feature_files import Pictures
from darkroom.evaluation.picture_sources import GeneratedPictures, eight_bits
from darkroom.first_stage.identity import IdentityAutoencoder
from darkroom.latent_diffusion import LatentDiffusion
from darkroom.objective import bits_per_dimension

LEVELS = 100  # of the bound, where none are asked for; the publications take all 1000 of their tables
BINS = 256  # values of an 8-bit pixel


def on_pixels(model: LatentDiffusion) -> bool:
    """Whether the denoiser's variable is the image itself."""
    return model.first_stage is None or isinstance(model.first_stage.autoencoder, IdentityAutoencoder)


def bits_name(model: LatentDiffusion) -> str:
    """ "bits/dim" of pixels are those of the publications; a density of latents is another thing."""
    return "bits/dim" if on_pixels(model) else "bits/dim of latents"


def bound_variance(model: LatentDiffusion) -> Literal["learned", "beta"]:
    """Of the reverse steps."""
    return "learned" if model.denoiser.learned_variance else "beta"


def bound_grid(model: LatentDiffusion, levels: int) -> Grid:
    """Levels that end at the data: evenly over the table, all of it where as many are asked for."""
    schedule = model.denoiser.schedule
    if isinstance(schedule, DDPMSchedule):
        levels = min(levels, schedule.config.timesteps)
    return make_grid(schedule, levels, "trailing", final="clean")


class BoundSource:
    """The reference images whose conditions `generated` has, each with what the bound says of it."""

    def __init__(self, generated: GeneratedPictures, levels: int) -> None:
        self.generated, self.grid = generated, bound_grid(generated.model, levels)

    def __len__(self) -> int:
        return len(self.generated)

    @torch.no_grad()
    def read(self, numbers: Sequence[int]) -> Pictures:
        source, model = self.generated, self.generated.model
        assert source.dataset is not None
        examples = [source.example(n) for n in numbers]
        pixels = source.dataset.pixels
        stored = torch.stack([example["image"] for example in examples])
        image = pixels.to_network(stored).to(model.device)
        x0: Tensor = image if model.first_stage is None else model.first_stage.encode(image).mode()
        request = model.validate(source.request(numbers, examples))
        conditioning = model.encode_condition(request, slice(0, len(numbers)))
        noise = SeededNoise(request.seeds, tuple(x0.shape[1:]), model.device)
        bins = BINS if on_pixels(model) and pixels.dtype == "uint8" else None
        variance = bound_variance(model)
        bound = bits_per_dimension(
            model.denoiser, x0.float(), self.grid, noise, conditioning, variance=variance, bins=bins
        )
        values = {bits_name(model): bound.total.cpu()}
        return Pictures(eight_bits(stored.permute(0, 2, 3, 1), pixels), values)
