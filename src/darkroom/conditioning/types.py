"""`Conditioning`: everything a denoiser is told besides the noisy latent.

Shapes: B batch, L tokens, D width, C channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Side inputs by named slot; a slot that is not used is None.

    context:      (B, L, D) tokens for cross-attention
    context_mask: (B, L) bool, True = a real token, False = padding that attention must not see
    vector:       (B, D) pooled embedding added to the time embedding
    concat:       (B, C, H, W) maps joined to the latent's channels; (B, C, 1, 1) means the same everywhere
    label:        (B,) integers for networks that embed classes themselves
    """

    context: Tensor | None = None
    context_mask: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    label: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `function` to every slot that is present."""
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: function(value) for name, value in present.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move all slots; `dtype` applies to floating-point slots only."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def spread(self, height: int, width: int) -> Conditioning:
        """Maps of one pixel as large as the latent; everything else as it is."""
        if self.concat is None or self.concat.shape[2:] != (1, 1) or (height, width) == (1, 1):
            return self
        return replace(self, concat=self.concat.expand(-1, -1, height, width))

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """The same slots for some examples of the batch."""
        return self.map(lambda t: t[index])

    @property
    def batch_size(self) -> int | None:
        for f in fields(self):
            if (value := getattr(self, f.name)) is not None:
                return int(value.shape[0])
        return None

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch. Every part fills the same slots."""
        slots: dict[str, Tensor] = {}
        for f in fields(Conditioning):
            values = [getattr(p, f.name) for p in parts]
            if all(v is None for v in values):
                continue
            if any(v is None for v in values):
                raise ValueError(f"cannot join conditionings: only some fill the slot {f.name!r}")
            slots[f.name] = torch.cat(values)
        return Conditioning(**slots)

    @staticmethod
    def where(keep: Tensor, one: Conditioning, other: Conditioning) -> Conditioning:
        """Per example: slots of `one` where `keep` (B,) is True, of `other` elsewhere. Both fill the same slots."""
        slots: dict[str, Tensor] = {}
        for f in fields(Conditioning):
            a, b = getattr(one, f.name), getattr(other, f.name)
            if (a is None) != (b is None):
                raise ValueError(f"cannot mix conditionings: only one fills the slot {f.name!r}")
            if a is not None:
                slots[f.name] = torch.where(keep.to(a.device).view(-1, *[1] * (a.ndim - 1)), a, b.to(a.device))
        return Conditioning(**slots)
