"""What is taken where a command or a request leaves it out: the model, and what that model's index or note says of its
own generation.

Anybody may have written the latter, so it is read strictly and within bounds: a default must not ask for a day of work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from darkroom.config import from_dict
from darkroom.errors import DarkroomError

# Bundled models for those who name none.
DEFAULT_MODELS = {"generate": "emoji", "upscale": "clothing-sr", "edit": "clothing-inpaint"}
MAX_STEPS, MAX_SIDE, MAX_BATCH = 10_000, 16_384, 65_536


@dataclass(frozen=True)
class GenerationDefaults:
    """None: the library's own. size: (width, height)"""

    steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    batch_size: int | None = None
    size: tuple[int, int] | None = None


def check_defaults(given: Any, where: object) -> None:
    """Raise what is wrong with a table of defaults. where: it stands, in the message."""
    if given is None:
        return
    try:
        read = from_dict(GenerationDefaults, given, "defaults")
    except DarkroomError as error:
        raise DarkroomError(f"{where}: {error}") from None
    for name, values, most in (
        ("steps", [read.steps], MAX_STEPS),
        ("batch_size", [read.batch_size], MAX_BATCH),
        ("size", read.size or [], MAX_SIDE),
    ):
        for value in values:
            if value is not None and not 1 <= value <= most:
                raise DarkroomError(f"{where}: the default {name} is {value}; it is 1 to {most}")
    if read.guidance_scale is not None and not math.isfinite(read.guidance_scale):
        raise DarkroomError(f"{where}: the default guidance_scale is {read.guidance_scale}; give a finite number")
