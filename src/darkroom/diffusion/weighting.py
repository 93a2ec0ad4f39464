"""Loss weight per noise level. The loss is the squared error of the network's raw output times this weight.

Papers state weights for the error of x0; with |x0 error|^2 = k2 * |raw error|^2 each weight is multiplied by k2, so
that one name means one objective whatever the network predicts. Shapes: levels and weights (B,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom.diffusion.levels import NoiseLevel
from darkroom.errors import DarkroomError

LOSS_WEIGHTINGS = ("uniform", "x0", "snr", "min_snr", "edm", "vlb")


def _x0_error_factor(level: NoiseLevel, prediction_type: str, sigma_data: float) -> tuple[Tensor, Tensor]:
    """k2 = |x0 error|^2 / |raw error|^2, and SNR*k2, each in a closed form that is finite wherever its limit is."""
    a2, s2 = level.alpha**2, level.sigma**2
    if prediction_type == "epsilon":
        return s2 / a2, torch.ones_like(a2)
    if prediction_type == "x0":
        return torch.ones_like(a2), a2 / s2
    if prediction_type == "v":
        norm = (a2 + s2) ** 2
    elif prediction_type == "velocity":
        norm = (level.alpha + level.sigma) ** 2
    else:
        norm = a2 + s2 / sigma_data**2
    return s2 / norm, a2 / norm


def loss_weight(
    kind: str,
    level: NoiseLevel,
    prediction_type: str,
    *,
    min_snr_gamma: float = 5.0,
    sigma_data: float = 0.5,
    previous: NoiseLevel | None = None,
) -> Tensor:
    """(B,) weight of the squared error of the raw output.

    uniform: 1 (L_simple for epsilon, Ho et al. 2020, eq. 14; the flow-matching loss for velocity; EDM's own for edm).
    x0:      the plain error of x0.
    snr:     alpha^2/sigma^2 times the error of x0, which is the plain error of epsilon.
    min_snr: min(SNR, gamma) times the error of x0; Hang et al. 2023, eq. 7.
    edm:     (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 times the error of x0; Karras et al. 2022, table 1.
    vlb:     (SNR(previous) - SNR) / 2 times the error of x0: a term of the bound; Kingma et al. 2021, eq. 14.
    """
    if kind not in LOSS_WEIGHTINGS:
        raise DarkroomError(f"unknown loss weighting {kind!r}; choose one of {', '.join(LOSS_WEIGHTINGS)}")
    if kind == "uniform":
        return torch.ones_like(level.alpha)
    k2, snr_k2 = _x0_error_factor(level, prediction_type, sigma_data)
    if kind == "x0":
        return k2
    if kind == "snr":
        return snr_k2
    if kind == "min_snr":
        return torch.minimum(snr_k2, min_snr_gamma * k2)
    if kind == "edm":
        # (s^2 + a^2 d^2) / (s^2 d^2) * k2 = k2/d^2 + SNR*k2, with d = sigma_data.
        return k2 / sigma_data**2 + snr_k2
    if previous is None:
        raise DarkroomError("loss weighting 'vlb' needs discrete steps; use a DDPM table or another weighting")
    # SNR(previous)*k2 = SNR*k2 * exp(2 (l' - l)): no difference of two large numbers.
    return 0.5 * snr_k2 * torch.expm1(2 * (previous.half_log_snr - level.half_log_snr))
