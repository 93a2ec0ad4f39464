"""The terms of the first stage's objective as pure functions (Rombach et al. 2022, App. G; Esser et al. 2021, eq. 6-7).

Everything is float32 or float64. Sums run over the elements of an image and are divided by the batch size, as in the
official code: reconstruction errors of one image are log-likelihoods in nats, comparable with its KL divergence.
Shapes: B batch, C channels, H W image size; logits (B, 1, h, w).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ADAPTIVE_WEIGHT_EPSILON = 1e-4
ADAPTIVE_WEIGHT_MAX = 1e4

ReconstructionKind = Literal["l1", "l2"]
DiscriminatorLossKind = Literal["hinge", "vanilla", "relativistic"]


def reconstruction_error(
    image: Tensor, reconstruction: Tensor, kind: ReconstructionKind = "l1", chroma_weight: float = 1.0
) -> Tensor:
    """(B, C, H, W): |d| or d^2 of d = x - y; with m the mean of d over the channels, m + chroma_weight * (d - m)."""
    difference = image - reconstruction
    if chroma_weight != 1.0:
        brightness = difference.mean(1, keepdim=True)
        difference = brightness + chroma_weight * (difference - brightness)
    return difference.abs() if kind == "l1" else difference.square()


def reconstruction_nll(error: Tensor, log_variance: Tensor | float = 0.0) -> Tensor:
    """(): sum(error / exp(s) + s) / B for a scalar log-variance s: the (unnormalised) Laplace or Gaussian likelihood.

    `error` is (B, C, H, W), perceptual distance included.
    """
    s = torch.as_tensor(log_variance, dtype=error.dtype, device=error.device)
    return (error.sum() * torch.exp(-s) + s * error.numel()) / error.shape[0]


def hinge_loss(real: Tensor, fake: Tensor, weights: Tensor | None = None) -> Tensor:
    """(): (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 (Lim & Ye 2017). `weights` (B,) weighs the examples."""
    loss_real, loss_fake = F.relu(1.0 - real), F.relu(1.0 + fake)
    if weights is None:
        return 0.5 * (loss_real.mean() + loss_fake.mean())
    per_image = loss_real.flatten(1).mean(1) + loss_fake.flatten(1).mean(1)
    return 0.5 * (weights * per_image).sum() / weights.sum()


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(): (mean softplus(-real) + mean softplus(fake)) / 2: cross-entropy (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def squared_slope(logits: Tensor, near: Tensor, step: float) -> Tensor:
    """How steep a discriminator is: the mean of (D(x + step * e) - D(x))^2 / step^2 for standard normal e, which tends
    to the squared norm of its gradient (R1 and R2 of Mescheder et al. 2018, eq. 9-10) and needs no second derivative
    (Lin et al. 2025, "Diffusion Adversarial Post-Training", eq. 4)."""
    return ((near - logits) / step).square().mean()


def relativistic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(): mean softplus(fake - real), each patch of a reconstruction against the same patch of its image
    (Jolicoeur-Martineau 2018, RpGAN). What the picture shows raises both logits alike and cancels, so that only what
    the reconstruction lost is left to be learned."""
    return F.softplus(fake - real).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: DiscriminatorLossKind = "hinge") -> Tensor:
    """(): what the discriminator minimises, from its logits on images and on reconstructions."""
    return {"hinge": hinge_loss, "vanilla": vanilla_loss, "relativistic": relativistic_loss}[kind](real, fake)


def adversarial_loss(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """(): what the autoencoder minimises: -mean(fake), as in the official code for either kind of discriminator; given
    the logits of the images too, the relativistic loss with the parts exchanged."""
    return -fake.mean() if real is None else relativistic_loss(fake, real)


def adaptive_weight(
    reconstruction_gradient: Tensor, adversarial_gradient: Tensor, maximum: float = ADAPTIVE_WEIGHT_MAX
) -> Tensor:
    """(): |grad nll| / (|grad adversarial| + 1e-4), at most `maximum` (Esser et al. 2021, eq. 7).

    Both gradients are with respect to the decoder's last convolution weight.
    """
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + ADAPTIVE_WEIGHT_EPSILON)
    return ratio.clamp(0.0, maximum).detach()


def delayed(weight: float, train_step: int, start: int) -> float:
    """`weight` from train step `start` on, 0 before."""
    return weight if train_step >= start else 0.0
