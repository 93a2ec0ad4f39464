"""Class labels: a learned embedding per class (Rombach et al. 2022, sec. 4.1 and App. E.2.1).

Shapes: B batch, D width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from difflib import get_close_matches
from typing import Any, Self

import torch
from torch import Tensor, nn

from darkroom.conditioning.encoder import ConditionEncoder, DataFacts, EncoderConfig
from darkroom.conditioning.types import Conditioning
from darkroom.errors import DarkroomError


@dataclass
class ClassEncoderConfig(EncoderConfig):
    """classes:    their names, in the order of the labels in the data
    width:      D of the embedding; not used for the slot `label`
    slot:       "context": one token (B, 1, D) for cross-attention, as in the paper; "vector": (B, D);
                "label": (B,) the bare numbers, for networks that embed classes themselves
    null_class: reserve one more class, the last, that stands for "no class"
    """

    kind: str = "class"
    field: str = "class_label"
    classes: list[str] = dataclass_field(default_factory=list)
    width: int | None = None
    slot: str = "context"
    null_class: bool = True

    def completed(self, name: str, data: DataFacts) -> Self:
        if self.classes:
            return self
        if not data.class_names:
            raise DarkroomError(f'"conditioner.{name}" needs classes, but the data has none: use class folders or .cls')
        return replace(self, classes=list(data.class_names))


class ClassEncoder(ConditionEncoder):
    """Class names or numbers -> one slot. Parameter name `embedding.weight` as in the official code."""

    config_class = ClassEncoderConfig

    def __init__(self, config: ClassEncoderConfig) -> None:
        rows = len(config.classes) + int(config.null_class)
        if not config.classes:
            raise DarkroomError("class encoder: no classes; give their names in `classes`")
        if config.slot not in ("context", "vector", "label"):
            raise DarkroomError(f"class encoder: slot is {config.slot!r}; use 'context', 'vector' or 'label'")
        if config.slot != "label" and not config.width:
            raise DarkroomError(f"class encoder: the slot {config.slot!r} needs a width")
        if config.drop_rate > 0 and not config.null_class:
            raise DarkroomError("class encoder: drop_rate needs a null class; set null_class or drop_rate: 0")
        width = rows if config.slot == "label" else config.width or 0
        super().__init__(config.field, {config.slot: width}, config.drop_rate, config.guidance_scale)
        self.config = config
        self._index = {name: i for i, name in enumerate(config.classes)}
        if len(self._index) != len(config.classes):
            raise DarkroomError("class encoder: two classes have one name; make the names unique")
        self.embedding = None if config.slot == "label" else nn.Embedding(rows, config.width or 0)

    @property
    def null_index(self) -> int:
        if not self.config.null_class:
            raise DarkroomError("this model has no null class, so guidance cannot work; use a guidance scale of 1")
        return len(self.config.classes)

    @property
    def _is_numbered(self) -> bool:
        """No checkpoint of others holds names of classes; numbers stand for them."""
        return all(name == str(index) for index, name in enumerate(self.config.classes))

    def class_index(self, value: str | int) -> int:
        """The number of a class, given its name or its number."""
        if isinstance(value, str) and value in self._index:
            return self._index[value]
        if isinstance(value, str) and not re.fullmatch("[0-9]{1,9}", value):
            if self._is_numbered:
                last = len(self.config.classes) - 1
                raise DarkroomError(
                    f"unknown class {value!r}; this model knows its classes by number alone, 0 to {last}"
                )
            near = get_close_matches(value, self.config.classes, n=3, cutoff=0.0)
            raise DarkroomError(f"unknown class {value!r}; the nearest are {', '.join(map(repr, near))}")
        count = len(self.config.classes)
        if not 0 <= int(value) < count:
            raise DarkroomError(f"unknown class {value}; this model has the classes 0 to {count - 1}")
        return int(value)

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> int:
        return self.class_index(value)

    def record(self, field: str, value: Any) -> str:
        return self.config.classes[value]

    def _indices(self, values: Sequence[Any] | Tensor) -> Tensor:
        """Names, numbers, None (no class) or a tensor of numbers up to the null class -> (B,) int64 on the CPU or the
        tensor's device."""
        if isinstance(values, Tensor):
            return values.to(torch.int64)
        return torch.tensor([self.null_index if v is None else self.class_index(v) for v in values], dtype=torch.int64)

    def _embed(self, labels: Tensor) -> Conditioning:
        if self.embedding is None:
            return Conditioning(label=labels)
        vector = self.embedding(labels.to(self.embedding.weight.device))
        return Conditioning(vector=vector) if self.config.slot == "vector" else Conditioning(context=vector[:, None])

    def encode(self, values: Sequence[Any] | Tensor) -> Conditioning:
        return self._embed(self._indices(values))

    def null(self, batch_size: int) -> Conditioning:
        return self._embed(torch.full((batch_size,), self.null_index))

    def encode_kept(self, values: Sequence[Any] | Tensor, keep: Tensor) -> Conditioning:
        labels = self._indices(values)
        return self._embed(torch.where(keep.to(labels.device), labels, self.null_index))
