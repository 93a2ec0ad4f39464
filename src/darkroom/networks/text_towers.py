"""Published text towers by family and named size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from darkroom.config import from_dict, nearest, to_dict
from darkroom.errors import DarkroomError
from darkroom.networks.clip import (
    CLIP_TEXT_SIZES,
    OPEN_CLIP_TEXT_SIZES,
    CLIPText,
    CLIPTextConfig,
    OpenCLIPText,
    OpenCLIPTextConfig,
)
from darkroom.networks.t5 import T5_SIZES, T5Encoder, T5EncoderConfig

_FAMILIES: dict[str, tuple[Callable[[Any], nn.Module], type[Any], Mapping[str, Any]]] = {
    "clip": (CLIPText, CLIPTextConfig, CLIP_TEXT_SIZES),
    "open_clip": (OpenCLIPText, OpenCLIPTextConfig, OPEN_CLIP_TEXT_SIZES),
    "t5": (T5Encoder, T5EncoderConfig, T5_SIZES),
}


def tower_config(family: str, model: str, options: Mapping[str, Any]) -> Any:
    """The complete config of a named size, with options that differ from it."""
    _, config, sizes = _FAMILIES[family]
    if model not in sizes:
        raise DarkroomError(f'text: "{model}" is not a size of {family}{nearest(model, sizes)}')
    return from_dict(config, {**to_dict(sizes[model]), **options}, f"{family}.network")


def make_text_tower(family: str, model: str, options: Mapping[str, Any]) -> nn.Module:
    """An untrained tower of a named size, with options that differ from it."""
    return _FAMILIES[family][0](tower_config(family, model, options))


# By family, what makes a tower from the name of its size and options.
TEXT_TOWERS = {family: partial(make_text_tower, family) for family in _FAMILIES}
