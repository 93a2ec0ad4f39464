"""Conditions as someone asks for them, read as the data would give them, and as they are recorded inside an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from darkroom.conditioning.conditioner import Conditioner
from darkroom.conditioning.encoder import ConditionEncoder
from darkroom.config import understanding
from darkroom.errors import DarkroomError


def named_encoders(conditioner: Conditioner) -> list[tuple[str, ConditionEncoder]]:
    """All encoders with their names, in their order."""
    return [(name, e) for name, e in conditioner.encoders.items() if isinstance(e, ConditionEncoder)]


def encoders_of(conditioner: Conditioner) -> list[ConditionEncoder]:
    """All encoders, in their order."""
    return [encoder for _, encoder in named_encoders(conditioner)]


def encoder_of(conditioner: Conditioner, field: str) -> ConditionEncoder:
    """The first encoder that reads a field."""
    for encoder in encoders_of(conditioner):
        if field in encoder.fields:
            return encoder
    takes = " or ".join(sorted(conditioner.fields)) or "no condition at all"
    close = get_close_matches(field, conditioner.fields, n=1)
    hint = f' (did you mean "{close[0]}"?)' if close else ""
    raise DarkroomError(f"this model does not take {field!r}{hint}: it was trained with {takes}")


def read_conditions(
    conditioner: Conditioner, given: Mapping[str, Any] | None, size: tuple[int, int]
) -> dict[str, list[Any]]:
    """By field, a list of values for images of (width, height): one per image, or one for all of them.

    What has been read already is read again without change. Raises DarkroomError for what the model does not take, and
    for a condition of two parts (picture and mask) of which one is missing.
    """
    width, height = size
    read: dict[str, list[Any]] = {}
    for field, value in (given or {}).items():
        if value is None:
            continue
        encoder = encoder_of(conditioner, field)
        with understanding(field, "a condition of this model"):
            values = list(value) if encoder.several(value) else [value]
            if not values:
                raise DarkroomError(f"{field}: the list is empty; give one value per image, or one for all")
            read[field] = [encoder.from_request(field, v, (width, height)) for v in values]
    for encoder in encoders_of(conditioner):
        there = [field for field in encoder.fields if field in read]
        if there and len(there) < len(encoder.fields):
            missing = " and ".join(field for field in encoder.fields if field not in read)
            raise DarkroomError(f"{there[0]} needs {missing} beside it; give both")
    return read


def collate_values(values: Sequence[Any]) -> Any:
    """Values of several images -> what an encoder is given: a tensor (B, ...) where all have one shape."""
    if values and all(isinstance(v, Tensor) for v in values) and len({v.shape for v in values}) == 1:
        return torch.stack(list(values))
    return list(values)


def record_conditions(conditioner: Conditioner, read: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """What the settings inside an image say about its conditions."""
    return {
        field: [encoder_of(conditioner, field).record(field, value) for value in values]
        for field, values in read.items()
    }
