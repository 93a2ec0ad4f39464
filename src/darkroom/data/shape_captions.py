"""The language of `shapes`: what a caption can say, what it means, and which combinations training never sees.

A caption is one of
    a red circle
    a red circle on the left | on the right | at the top | at the bottom | in the center
    a red circle to the left of a blue square | to the right of | above | below
The two objects of a pair always differ in colour; their shapes may be equal.

Meaning (x grows to the right, y grows downwards, in pixels; the centre of an object is the centre of its bounding box):
    on the left     centre x < W/3                 at the top      centre y < H/3
    on the right    centre x > 2W/3                at the bottom   centre y > 2H/3
    in the center   W/3 <= x <= 2W/3 and H/3 <= y <= 2H/3
    A to the left of B    x_B - x_A > |y_B - y_A|           A above B    y_B - y_A > |x_B - x_A|

Held out (numbers are positions in SHAPES and COLOURS):
    an object whose colour and shape satisfy (colour - shape) mod 8 = 0: 6 of 48, no shape or colour entirely;
    a pair, written so that its relation is `to the left of` (axis 0) or `above` (axis 1), whose shapes satisfy
    (first + 2*second + 3*axis) mod 7 = 0: 11 of 72, the same whichever of the two objects the caption names first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from darkroom.data.shape_rendering import COLOURS, SHAPES
from darkroom.errors import DarkroomError

POSITIONS = ("on the left", "on the right", "at the top", "at the bottom", "in the center")
RELATIONS = ("to the left of", "to the right of", "above", "below")
OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}

_OBJECT = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(POSITIONS)})| ({'|'.join(RELATIONS)}) {_OBJECT})?")


@dataclass(frozen=True)
class CaptionObject:
    """One named object."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """The content of a caption: one object, perhaps with a position, or two with a relation (first RELATION second)."""

    objects: tuple[CaptionObject, ...]
    position: str | None = None
    relation: str | None = None

    def __str__(self) -> str:
        if self.relation is not None:
            return f"{self.objects[0]} {self.relation} {self.objects[1]}"
        return f"{self.objects[0]} {self.position}" if self.position else str(self.objects[0])

    @property
    def kind(self) -> str:
        return "single" if self.relation is None else "pair"

    @property
    def held_out(self) -> bool:
        """Whether training never sees this combination (rule in the module's docstring)."""
        colours = list(COLOURS)
        if any((colours.index(o.colour) - SHAPES.index(o.shape)) % len(colours) == 0 for o in self.objects):
            return True
        if self.relation is None:
            return False
        first, second = (SHAPES.index(o.shape) for o in self.objects)
        if self.relation in ("to the right of", "below"):
            first, second = second, first
        axis = 0 if "to the" in self.relation else 1
        return (first + 2 * second + 3 * axis) % 7 == 0


def parse_caption(caption: str) -> Caption:
    """Text -> content. Case and a final full stop do not matter; anything else outside the language is an error."""
    match = _CAPTION.fullmatch(" ".join(caption.lower().rstrip(".").split()))
    if match is None:
        raise DarkroomError(
            f"not a shapes caption: {caption!r}; write for example 'a red circle on the left' or "
            "'a red circle above a blue square'"
        )
    colour, shape, position, relation, colour2, shape2 = match.groups()
    objects = [CaptionObject(colour, shape)]
    if relation:
        objects.append(CaptionObject(colour2, shape2))
    return Caption(tuple(objects), position, relation)


def held_out(caption: str) -> bool:
    """Whether the combination in this caption is kept out of the train split."""
    return parse_caption(caption).held_out


def draw_caption(rng: np.random.Generator, kind: str) -> Caption:
    """A caption of this kind ("single" or "pair"), all combinations equally likely."""
    colours = list(COLOURS)
    count = 1 if kind == "single" else 2
    chosen = rng.permutation(len(colours))[:count]
    shapes = rng.integers(len(SHAPES), size=count)
    objects = tuple(CaptionObject(colours[c], SHAPES[s]) for c, s in zip(chosen, shapes, strict=True))
    if kind == "single":
        position = int(rng.integers(len(POSITIONS) + 1))
        return Caption(objects, position=POSITIONS[position] if position < len(POSITIONS) else None)
    return Caption(objects, relation=RELATIONS[int(rng.integers(len(RELATIONS)))])


def prompts(count: int, seed: int = 0, kind: str = "single", held_out: bool | None = None) -> list[str]:
    """`count` captions for evaluation: the same for the same arguments.

    held_out: True for combinations that training never saw, False for those it can have seen, None for the natural mix.
    """
    if kind not in ("single", "pair"):
        raise DarkroomError(f"prompts of kind {kind!r} do not exist; use 'single' or 'pair'")
    rng = np.random.default_rng([seed, 7])
    found: list[str] = []
    while len(found) < count:
        caption = draw_caption(rng, kind)
        if held_out is None or caption.held_out == held_out:
            found.append(str(caption))
    return found
