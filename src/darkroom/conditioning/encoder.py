"""`ConditionEncoder`: turns one field of a batch into slots of a `Conditioning`, and knows what "nothing" looks like.

A new modality is a subclass of this, nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError


class ConditionEncoder(nn.Module, ABC):
    """One encoder of a `Conditioner`.

    field:     the field of the batch that it reads
    widths:    for each slot that it fills the size the network must expect: D of `context` and `vector`, C of `concat`,
               the number of classes (with the null class) of `label`
    drop_rate: share of training examples for which the null condition takes the place of the real one, which is what
               classifier-free guidance needs (Ho & Salimans 2022)
    """

    def __init__(self, field: str, widths: dict[str, int], drop_rate: float) -> None:
        super().__init__()
        if not 0.0 <= drop_rate <= 1.0:
            raise DarkroomError(f"conditioner: drop_rate is {drop_rate}; give a share between 0 and 1")
        self.field = field
        self.widths = widths
        self.drop_rate = drop_rate

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(self.widths)

    @abstractmethod
    def encode(self, values: Sequence[Any] | Tensor) -> Conditioning:
        """The batch's values of the field, B of them -> slots of B examples."""

    @abstractmethod
    def null(self, batch_size: int) -> Conditioning:
        """The absence of the condition, with the same slots and sizes as `encode` gives."""

    def encode_kept(self, values: Sequence[Any] | Tensor, keep: Tensor) -> Conditioning:
        """`encode` where keep (B,) bool is True, `null` elsewhere. Override it where dropping the value first is
        cheaper than encoding both."""
        return Conditioning.where(keep, self.encode(values), self.null(len(values)))
