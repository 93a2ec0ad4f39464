"""Mean and spread of the latents of a set of images, from which a first stage's shift and scale follow.

A posterior N(m, v) per position contributes its mean m and its variance v: the numbers are those of infinitely many
posterior samples, without drawing any (law of total variance).
Shapes: B batch, E latent channels, h w latent size.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from darkroom.errors import DarkroomError
from darkroom.first_stage.posterior import Posterior

LatentStatistics = Literal["global", "channel", "std"]
"""What shift and scale are made of: one mean and one standard deviation of all channels; one of each per channel; or
the standard deviation alone, shift 0 (Rombach et al. 2022, App. G: scale = 1/std)."""

# Of an autoencoder, what lies behind the latent. Everything else decides what the latent of an image is.
BEHIND_THE_LATENT = ("decoder.", "post_quant_conv.", "quantize.")


class RunningMoments:
    """Mean and variance per channel, streamed in float64 around the mean so far (Chan et al. 1983), hence neither the
    order of magnitude nor the number of images costs precision."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, posterior: Posterior) -> None:
        """The latents (B, E, h, w) of some images."""
        z = posterior.mean.detach().double().cpu().transpose(0, 1).flatten(1)  # (E, B*h*w)
        n = z.shape[1]
        mean = z.mean(1)
        delta = mean - self.mean
        self.squares += (z - mean[:, None]).square().sum(1) + delta.square() * (self.count * n / (self.count + n))
        if posterior.logvar is not None:
            self.squares += posterior.logvar.detach().double().exp().cpu().transpose(0, 1).flatten(1).sum(1)
        self.mean += delta * (n / (self.count + n))
        self.count += n

    def shift_and_scale(self, kind: LatentStatistics = "global") -> tuple[Tensor, Tensor]:
        """(shift, scale), float64: () or, per channel, (E,)."""
        if kind not in get_args(LatentStatistics):
            raise DarkroomError(f'latents "{kind}" is not known: use {", ".join(get_args(LatentStatistics))}')
        if self.count == 0:
            raise DarkroomError("cannot measure the latents of no images: give at least one batch")
        mean, squares = self.mean, self.squares
        if kind != "channel":  # channels hold equally many elements each
            total = mean.mean()
            squares = (squares + self.count * (mean - total).square()).mean()
            mean = total
        std = (squares / self.count).sqrt()
        if not bool(torch.isfinite(std).all()) or bool((std <= 0).any()):
            raise DarkroomError(
                f"the latents of these images have standard deviation {std.tolist()}: "
                "the autoencoder is not trained or has diverged"
            )
        return torch.zeros_like(mean) if kind == "std" else mean, 1.0 / std


def encoder_fingerprint(autoencoder: nn.Module, stored_as: torch.dtype | None = None) -> str:
    """SHA-256 of what decides an image's unnormalised latent: the encoder's weights, not the decoder, shift or scale.

    It is what latent caches and preview decoders belong to, so both outlive a decoder that is tuned and statistics that
    are measured again. stored_as: of the weights as they will be when they were saved in this dtype and loaded again.
    """
    digest = hashlib.sha256(f"{type(autoencoder).__name__} f={getattr(autoencoder, 'downsampling', None)}".encode())
    for name, value in autoencoder.state_dict().items():
        if name.startswith(BEHIND_THE_LATENT):
            continue
        if stored_as is not None and value.is_floating_point():
            value = value.to(stored_as)
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().float().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
