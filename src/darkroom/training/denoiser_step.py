"""The denoiser's train step: batch -> latent and conditioning -> time and noise -> denoising loss.

Shapes: B batch, C latent channels, H W latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.types import Conditioning
from darkroom.denoiser import Denoiser
from darkroom.diffusion.time_sampling import sample_time
from darkroom.first_stage.first_stage import FirstStage
from darkroom.objective import ObjectiveConfig, denoising_loss
from darkroom.training.loop import Phase, all_parameters, fixed_times, step_generator

Batch = dict[str, Any]
VALIDATION_DRAWS = 256  # of time and noise, at least, for one number


def draw(shape: torch.Size | tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal noise drawn on the CPU in float32, so that it does not depend on the device."""
    return torch.randn(shape, generator=generator).to(like.device)


def batch_latent(
    batch: Batch, first_stage: FirstStage | None, generator: torch.Generator, device: torch.device
) -> Tensor:
    """(B, C, H, W) normalised latents: a fresh sample of the cached posterior ("moments"), of the image's posterior,
    or the image itself where there is no first stage (pixel diffusion)."""
    if "moments" in batch:
        assert first_stage is not None
        moments = batch["moments"].to(device, torch.float32)
        return first_stage.normalise(first_stage.from_moments(moments).sample(generator))
    image = batch["image"].to(device)
    if first_stage is None:
        return image
    with torch.no_grad():
        return first_stage.encode(image).sample(generator).float()


class DenoiserPhase(nn.Module):
    """One forward for DDP: trains the denoiser and the trainable encoders of the conditioner together."""

    def __init__(
        self,
        denoiser: Denoiser,
        conditioner: Conditioner,
        first_stage: FirstStage | None,
        objective: ObjectiveConfig,
    ) -> None:
        super().__init__()
        self.denoiser, self.conditioner, self.objective = denoiser, conditioner, objective
        self._frozen = (first_stage,)  # in a tuple it is no submodule: neither trained, averaged, nor saved here

    def forward(self, batch: Batch, generator: torch.Generator, train_step: int) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.denoiser.parameters()).device
        x0 = batch_latent(batch, self._frozen[0], generator, device)
        conditioning = self.conditioner(batch, generator, alone_rate=self.objective.alone_rate).to(device)
        if (draws := self.objective.draws) > 1:
            # One batch behind the other, so that stratified times give one example times far from each other.
            x0, conditioning = torch.cat([x0] * draws), Conditioning.cat([conditioning] * draws)
        places = x0.shape[2] * x0.shape[3]
        time = sample_time(self.objective, self.denoiser.schedule, x0.shape[0], generator, places)
        level = self.denoiser.schedule.level(time)
        noise = draw(x0.shape, generator, x0)
        loss = denoising_loss(self.denoiser, x0, noise, level, conditioning, self.objective)
        return loss.mean(), {}


class DenoiserStep:
    """The one-phase step of the second stage. The first stage is frozen and never part of the checkpoint."""

    def __init__(
        self,
        denoiser: Denoiser,
        conditioner: Conditioner,
        first_stage: FirstStage | None,
        objective: ObjectiveConfig,
    ) -> None:
        self.denoiser, self.conditioner, self.first_stage, self.objective = (
            denoiser,
            conditioner,
            first_stage,
            objective,
        )
        if first_stage is not None:
            first_stage.requires_grad_(False).eval()
        module = DenoiserPhase(denoiser, conditioner, first_stage, objective)
        self.phases = [Phase("denoiser", module, all_parameters([module]))]
        self.modules: dict[str, nn.Module] = {"denoiser": denoiser, "conditioner": conditioner}
        self.ema_modules = self.modules

    @torch.no_grad()
    def validation_loss(self, batches: list[Batch], seed: int, times: int = 8) -> dict[str, float]:
        """Mean loss on fixed images, times (strata of the schedule) and noise; lower is comparable between steps.

        Image k has time k mod `times`, and each time as many images as the others; fewer than `VALIDATION_DRAWS` images
        have several times each.
        """
        low, high = self.denoiser.schedule.time_range
        grid = fixed_times(low, high, times)
        device = next(self.denoiser.parameters()).device
        per_time: list[list[float]] = [[] for _ in range(times)]
        if not batches:
            return {}
        images = sum(len(batch["moments" if "moments" in batch else "image"]) for batch in batches)
        rounds = min(times, -(-VALIDATION_DRAWS // images))
        first = 0
        for i, batch in enumerate(batches):
            generator = step_generator(seed, "validation", i)
            x0 = batch_latent(batch, self.first_stage, generator, device)
            conditioning = self.conditioner(batch).to(device)
            for turn in range(rounds):
                places = (torch.arange(first, first + len(x0)) + turn * times // rounds) % times
                noise = draw(x0.shape, generator, x0)
                level = self.denoiser.schedule.level(grid[places])
                loss = denoising_loss(self.denoiser, x0, noise, level, conditioning, self.objective)
                for place, value in zip(places.tolist(), loss.float().tolist(), strict=True):
                    per_time[place].append(value)
            first += len(x0)
        per_time = [values for values in per_time if values]
        means = [sum(v) / len(v) for v in per_time]
        return {"validation_loss": sum(means) / len(means)}
