"""What a network reads of a `Conditioning`: see `darkroom.conditioning.types`, which this layer does not import."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Slots(Protocol):
    """Side inputs by name; a slot that is not used is None."""

    @property
    def context(self) -> Tensor | None: ...
    @property
    def context_mask(self) -> Tensor | None: ...
    @property
    def vector(self) -> Tensor | None: ...
    @property
    def concat(self) -> Tensor | None: ...
    @property
    def label(self) -> Tensor | None: ...
