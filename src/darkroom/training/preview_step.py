"""The train step of a preview decoder: distilled for the latent space of a frozen first stage.

    latent = a posterior sample, cached or encoded on the way;  minimise |preview(latent) - target| + perceptual part

where the target is the image itself, what the first stage's own decoder makes of the latent, or the mean of both.
Shapes: B batch, C image channels, H W image size, E latent channels, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from darkroom.features.psnr import psnr
from darkroom.first_stage.first_stage import FirstStage
from darkroom.first_stage.losses import ReconstructionKind, reconstruction_error
from darkroom.first_stage.preview import PreviewDecoder, PreviewDecoderConfig
from darkroom.training.first_stage_step import (
    FirstStageTrainConfig,
    Perceptual,
    make_perceptual,
    resolve_perceptual,
)
from darkroom.training.loop import LoopConfig, Phase, all_parameters

Batch = dict[str, Any]


@dataclass(frozen=True)
class PreviewTrainConfig:
    """What a preview decoder is trained for."""

    target: Literal["image", "decoder", "both"] = "image"  # "decoder" and "both" run the full decoder in every step
    reconstruction: ReconstructionKind = "l1"
    perceptual: Perceptual = "auto"
    perceptual_weight: float = 0.0
    latent_noise: float = 0.0  # standard deviation added to normalised latents: forgives a denoiser's errors


@dataclass(frozen=True)
class PreviewRecipe(LoopConfig):
    """Training a preview decoder for the recipe's first stage: its shape, what it learns, and the loop.

    cache: learn from cached latents (computed once; the denoiser's training uses the same). Random crops need false.
    install: also put it into the model folder that `first_stage` names, whose other files stay as they are.
    """

    network: PreviewDecoderConfig = field(default_factory=PreviewDecoderConfig)
    objective: PreviewTrainConfig = field(default_factory=PreviewTrainConfig)
    cache: bool = True
    install: bool = False


class PreviewStep:
    """One phase. The first stage is frozen and no part of the checkpoint."""

    def __init__(self, preview: PreviewDecoder, first_stage: FirstStage, config: PreviewTrainConfig) -> None:
        self.preview, self.first_stage, self.config = preview, first_stage, config
        first_stage.requires_grad_(False).eval()
        perceptual = FirstStageTrainConfig(perceptual=config.perceptual, perceptual_weight=config.perceptual_weight)
        self.perceptual = resolve_perceptual(perceptual, first_stage.image_channels)
        preview.requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        phase = PreviewPhase(preview, first_stage, make_perceptual(self.perceptual), config)
        self.phases = [Phase("preview", phase, all_parameters([phase]))]
        self.modules: dict[str, nn.Module] = {"preview": preview}
        self.ema_modules = self.modules

    @torch.no_grad()
    def validation_loss(self, batches: list[Batch]) -> dict[str, float]:
        """From the posterior's mode: mean PSNR against the images in dB, absolute error."""
        device = next(self.preview.parameters()).device
        count, decibels, absolute = 0, 0.0, 0.0
        for batch in batches:
            image = batch["image"].to(device)
            output = self.preview(batch_posterior(batch, self.first_stage).mode()).float().clamp(-1.0, 1.0)
            decibels += float(psnr(output, image).sum())
            absolute += float((output - image).abs().flatten(1).mean(1).sum())
            count += image.shape[0]
        return {"psnr": decibels / count, "validation_loss": absolute / count} if count else {}


class PreviewPhase(nn.Module):
    """One forward for DDP."""

    def __init__(
        self,
        preview: PreviewDecoder,
        first_stage: FirstStage,
        perceptual: nn.Module | None,
        config: PreviewTrainConfig,
    ) -> None:
        super().__init__()
        self.preview, self.config = preview, config
        self._frozen = (first_stage, perceptual)  # in a tuple they are no submodules

    def forward(self, batch: Batch, generator: torch.Generator, train_step: int) -> tuple[Tensor, dict[str, Tensor]]:
        first_stage, perceptual = self._frozen
        config = self.config
        device = next(self.preview.parameters()).device
        image = batch["image"].to(device)
        with torch.no_grad():
            latent = batch_posterior(batch, first_stage).sample(generator)
            targets = [] if config.target == "decoder" else [image]
            if config.target != "image":
                targets.append(first_stage.decode(latent).float().clamp(-1.0, 1.0))
        if config.latent_noise > 0:
            noise = torch.randn(latent.shape, generator=generator).to(latent)
            latent = latent + config.latent_noise * noise
        output = self.preview(latent.contiguous(memory_format=torch.channels_last))
        with torch.autocast(device.type, enabled=False):
            output = output.float()
            errors = [reconstruction_error(t, output, config.reconstruction).mean() for t in targets]
            loss = torch.stack(errors).mean()
            metrics = {"reconstruction": loss.detach()}
            if perceptual is not None:
                distance = torch.stack([perceptual.to(device)(t, output).mean() for t in targets]).mean()
                metrics["perceptual"] = distance.detach()
                loss = loss + config.perceptual_weight * distance
        return loss, metrics


def batch_posterior(batch: Batch, first_stage: FirstStage) -> Any:
    """The posterior of the normalised latents of a batch: of its cached `moments`, or of its images."""
    if "moments" in batch:
        moments = batch["moments"].to(first_stage.device, torch.float32)
        return first_stage.normalise_posterior(first_stage.from_moments(moments))
    return first_stage.encode(batch["image"].to(first_stage.device))
