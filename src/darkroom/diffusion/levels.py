"""A point on a noise schedule, and the move from one point to another.

Every diffusion of this package has the form  x = alpha * x0 + sigma * noise.
Shapes: B batch; levels hold scalars () while sampling and (B,) while training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseLevel:
    """x = alpha*x0 + sigma*noise at network time `time`, which grows with noise. target_time: one-step objectives."""

    alpha: Tensor
    sigma: Tensor
    time: Tensor
    target_time: Tensor | None = None

    @property
    def half_log_snr(self) -> Tensor:
        """log(alpha / sigma): half the log signal-to-noise ratio; +inf at data, -inf at pure noise."""
        return torch.log(self.alpha) - torch.log(self.sigma)

    def like(self, x: Tensor) -> NoiseLevel:
        """alpha and sigma in the device and dtype of x, shaped to broadcast over its channels. time keeps its dtype
        (moved to the device, expanded to (B,)): a network may need it in more precision than its activations."""

        def spread(t: Tensor) -> Tensor:
            t = t.to(device=x.device, dtype=x.dtype)
            return t if t.ndim == 0 else t.view(-1, *[1] * (x.ndim - 1))

        def per_image(t: Tensor) -> Tensor:
            return t.to(x.device).expand(x.shape[0])

        target = None if self.target_time is None else per_image(self.target_time)
        return replace(
            self, alpha=spread(self.alpha), sigma=spread(self.sigma), time=per_image(self.time), target_time=target
        )


def add_noise(x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """(B, ...): x = alpha*x0 + sigma*noise (Rombach et al. 2022, eq. 4-5; Kingma et al. 2021, eq. 1)."""
    at = level.like(x0)
    return at.alpha * x0 + at.sigma * noise
