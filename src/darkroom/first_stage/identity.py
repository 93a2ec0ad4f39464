"""The first stage with f = 1: latents are the image itself, so that diffusion on pixels is the same code."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from darkroom.first_stage.autoencoder import check_image
from darkroom.first_stage.posterior import Posterior


@dataclass(frozen=True)
class IdentityConfig:
    channels: int = 3  # of the image


class IdentityAutoencoder(nn.Module):
    """`encode` and `decode` give (B, C, H, W) back; there is nothing to train."""

    downsampling = 1
    codebook = None

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels

    @property
    def latent_channels(self) -> int:
        return self.channels

    @property
    def image_channels(self) -> int:
        return self.channels

    def encode(self, image: Tensor) -> Posterior:
        check_image(image, self.channels, 1)
        return Posterior(image)

    def decode(self, latent: Tensor, quantize: bool = True) -> Tensor:
        return latent
