"""Data whose denoiser is known exactly: a mixture of isotropic Gaussians under x = alpha*x0 + sigma*noise.

Shapes: B batch, D = C*H*W entries per image, K components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.diffusion.levels import NoiseLevel


@dataclass(frozen=True)
class GaussianMixture:
    """weights (K,), means (K, D), stds (K,); float64. Images (B, C, H, W) with C*H*W = D."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def _components(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        alpha = level.alpha.to(x).reshape(-1, 1, 1)
        sigma = level.sigma.to(x).reshape(-1, 1, 1)
        stds = self.stds.to(x)[None, :, None]
        means = self.means.to(x)[None]
        distance = x.flatten(1)[:, None, :] - alpha * means
        variance = (alpha * stds) ** 2 + sigma**2
        dims = means.shape[-1]
        log_density = (
            torch.log(self.weights.to(x))
            - 0.5 * (distance.square().sum(-1) / variance[..., 0])
            - 0.5 * dims * torch.log(2 * torch.pi * variance[..., 0])
        )
        return alpha, stds, means, distance / variance, log_density

    def log_density(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """(B,): log p(x) at the level."""
        return torch.logsumexp(self._components(x, level)[-1], -1)

    def x0(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """(B, C, H, W): E[x0 | x], exact; level () or (B,)."""
        alpha, stds, means, whitened, log_density = self._components(x, level)
        share = torch.softmax(log_density, -1)[..., None]
        return (share * (means + alpha * stds**2 * whitened)).sum(1).reshape(x.shape)

    def score(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """(B, C, H, W): gradient of log p(x) at the level, exact."""
        *_, whitened, log_density = self._components(x, level)
        share = torch.softmax(log_density, -1)[..., None]
        return -(share * whitened).sum(1).reshape(x.shape)

    def sample(self, count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """(count, *shape) float64 draws of the data."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return (self.means[which] + self.stds[which, None] * z).reshape(count, *shape)


def make_mixture() -> GaussianMixture:
    """Three components in two dimensions: wide, narrow and in between, none on an axis of symmetry."""
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means=torch.tensor([[-1.0, 0.4], [0.9, 0.7], [0.3, -1.1]], dtype=torch.float64),
        stds=torch.tensor([0.45, 0.3, 0.6], dtype=torch.float64),
    )
