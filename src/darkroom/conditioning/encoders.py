"""All condition encoders by the `kind` of their config. A new modality is one more row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from darkroom.conditioning.classes import ClassEncoder
from darkroom.conditioning.encoder import ConditionEncoder, EncoderConfig
from darkroom.conditioning.text import TextEncoder

ENCODERS: dict[str, type[ConditionEncoder]] = {
    "class": ClassEncoder,
    "text": TextEncoder,
}

if TYPE_CHECKING:
    AnyEncoderConfig = EncoderConfig
else:  # what recipes may hold, chosen by `kind`
    AnyEncoderConfig = Union[tuple(encoder.config_class for encoder in ENCODERS.values())]  # noqa: UP007
