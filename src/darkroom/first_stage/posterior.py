"""The diagonal Gaussian q(z | image) that the encoder describes.

Shapes: B batch, C latent channels, H W latent size. Everything is float32 (float64 if the moments are float64).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Range of the official code: exp(-30) and exp(20) stay finite and non-zero in float32.
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Posterior:
    """q(z | image) = N(mean, exp(logvar)); mean and logvar are (B, C, H, W). `logvar` None: a deterministic encoder."""

    mean: Tensor
    logvar: Tensor | None = None

    @staticmethod
    def from_moments(moments: Tensor) -> Posterior:
        """(B, 2C, H, W), [mean | logvar] along the channels; logvar is clamped to [-30, 20] as in the official code."""
        if moments.dtype != torch.float64:
            moments = moments.float()
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    @property
    def moments(self) -> Tensor:
        """(B, 2C, H, W): [mean | logvar]; the mean alone (B, C, H, W) if the encoder is deterministic."""
        return self.mean if self.logvar is None else torch.cat([self.mean, self.logvar], dim=1)

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.logvar is None else torch.exp(0.5 * self.logvar)

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.logvar is None else torch.exp(self.logvar)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw. Noise is made on the generator's device: a CPU generator gives the same noise for any device."""
        if self.logvar is None:
            return self.mean
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype)
        return self.sample_with(noise.to(self.mean.device))

    def sample_with(self, noise: Tensor) -> Tensor:
        """mean + std * noise (Kingma & Welling 2014, the reparametrisation)."""
        return self.mean if self.logvar is None else torch.addcmul(self.mean, self.std, noise)

    def kl(self, other: Posterior | None = None) -> Tensor:
        """(B,): KL(self || other), summed over C, H, W; `other` None is the standard normal.

        0.5 * sum((mean - mean')^2 / var' + var / var' - 1 - logvar + logvar')    (Kingma & Welling 2014, App. B)
        """
        if self.logvar is None:
            return self.mean.new_zeros(self.mean.shape[0])
        if other is None:
            terms = self.mean.square() + self.variance - 1.0 - self.logvar
        else:
            if other.logvar is None:
                raise ValueError("the KL divergence to a deterministic posterior is infinite")
            terms = (
                ((self.mean - other.mean).square() + self.variance) * torch.exp(-other.logvar)
                - 1.0
                - self.logvar
                + other.logvar
            )
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor) -> Tensor:
        """(B,): -log q(sample) in nats, summed over C, H, W."""
        if self.logvar is None:
            return self.mean.new_zeros(self.mean.shape[0])
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() * torch.exp(-self.logvar)
        return 0.5 * terms.flatten(1).sum(1)
