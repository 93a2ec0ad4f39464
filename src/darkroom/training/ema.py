"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def ema_decay(update: int, limit: float) -> float:
    """Decay before the n-th update (n from 1): min(limit, (1 + n) / (10 + n)), as the official LitEma warms up."""
    return min(limit, (1 + update) / (10 + update))


class EMA:
    """Averaged copies, in float32, of the trainable parameters of named modules. Buffers have no average: the live
    ones serve under either set of weights."""

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.modules = dict(modules)
        self.decay = decay
        self.updates = 0
        self._live = {
            f"{name}.{key}": p for name, m in self.modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.averages: dict[str, Tensor] = {key: p.detach().float().clone() for key, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * live."""
        self.updates += 1
        weight = 1.0 - ema_decay(self.updates, self.decay)
        torch._foreach_lerp_(list(self.averages.values()), [p.detach().float() for p in self._live.values()], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged values in place; called again it puts them back."""
        for key, p in self._live.items():
            live = p.detach().clone()
            p.copy_(self.averages[key])
            self.averages[key] = live.float()

    def __enter__(self) -> EMA:
        self.swap()
        return self

    def __exit__(self, *_: object) -> None:
        self.swap()
