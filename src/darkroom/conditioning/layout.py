"""Layout boxes as tokens: class, top left and bottom right corner of each object (Rombach et al. 2022, sec. 4.3.1; the
tokens are those of Jahn et al. 2021, arXiv 2105.06458).

A corner is one number, its place on a grid of `sections` x `sections`. Shapes: B batch, n objects, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from difflib import get_close_matches
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from darkroom.conditioning.encoder import ConditionEncoder, DataFacts, EncoderConfig, Parts
from darkroom.conditioning.types import Conditioning
from darkroom.config import nearest
from darkroom.errors import DarkroomError, warn

TOKENS_OF_A_BOX = 3


@dataclass
class LayoutEncoderConfig(EncoderConfig):
    """classes:     their names, in the order of the numbers in `boxes`
    max_objects: of one picture; what is more is left out
    sections:    columns and rows of the grid on which corners lie
    tokens:      as in the paper, classes and corners share the ids below this number (8192), of which the last means
                 "no object", and `sections` is the root of it (90); null: each has ids of its own
    crop:        also the two corners of the part of the picture that is seen, at the end, as in the paper. Here boxes
                 are relative to that part, so it is the whole
    attributes:  bits beside the class: numbers up to len(classes) * 2^attributes, class + len(classes) * bits
    shuffle:     in training the objects come in any order
    use_mask:    hide the places of missing objects from the tower and from the network; off in the paper
    width, depth, heads, head_width, dropout: the tower, see `TextTransformerConfig`
    """

    kind: str = "boxes"
    field: str = "boxes"
    classes: list[str] = dataclass_field(default_factory=list)
    max_objects: int = 30
    sections: int = 32
    tokens: int | None = None
    crop: bool = False
    attributes: int = 0
    shuffle: bool = True
    use_mask: bool = True
    width: int = 256
    depth: int = 4
    heads: int = 4
    head_width: int = 64
    dropout: float = 0.0

    def completed(self, name: str, data: DataFacts) -> Self:
        if self.classes:
            return self
        if not data.box_names:
            raise DarkroomError(f'"conditioner.{name}" needs boxes with classes, but the data has none')
        return replace(self, classes=list(data.box_names))


class BoxTokens:
    """Boxes <-> token ids. Pure: no parameters."""

    def __init__(self, config: LayoutEncoderConfig) -> None:
        self.classes = len(config.classes) << config.attributes
        self.max_objects, self.crop = config.max_objects, config.crop
        shared = config.tokens is not None
        self.sections = math.isqrt(config.tokens) if config.tokens is not None else config.sections
        self.first_place = 0 if shared else self.classes
        self.vocabulary_size = config.tokens or self.classes + self.sections**2 + 1
        self.none = self.vocabulary_size - 1
        if self.max_objects < 1 or self.sections < 2:
            raise DarkroomError(
                f"boxes: max_objects is {self.max_objects} and there are {self.sections} sections; give 1 and 2 or more"
            )
        if shared and self.classes > self.none:
            raise DarkroomError(
                f"boxes: {self.classes} classes do not fit in {config.tokens} tokens; set tokens to null or higher"
            )

    @property
    def length(self) -> int:
        return TOKENS_OF_A_BOX * self.max_objects + 2 * self.crop

    def places(self, x: Tensor, y: Tensor) -> Tensor:
        """Coordinates in [0, 1] -> ids of the nearest places of the grid, whose outermost lie on the border."""
        last = self.sections - 1
        column, row = ((c.double().clamp(0, 1) * last).round().long() for c in (x, y))
        return self.first_place + row * self.sections + column

    def encode(self, boxes: Tensor) -> Tensor:
        """(n, 5) class, x0, y0, x1, y1 -> (length,) ids."""
        ids = torch.full((self.length,), self.none)
        boxes = boxes[: self.max_objects]
        number, x0, y0, x1, y1 = boxes.reshape(-1, 5).unbind(1)
        rows = torch.stack([number.long(), self.places(x0, y0), self.places(x1, y1)], 1)
        ids[: rows.numel()] = rows.flatten()
        if self.crop:
            ids[-2:] = self.places(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
        return ids

    def decode(self, ids: Tensor) -> Tensor:
        """(length,) ids -> (n, 5), corners at the places of the grid."""
        rows = ids[: TOKENS_OF_A_BOX * self.max_objects].view(-1, TOKENS_OF_A_BOX)
        rows = rows[rows[:, 0] != self.none]
        places = (rows[:, 1:] - self.first_place).double()
        x = places.remainder(self.sections) / (self.sections - 1)
        y = places.div(self.sections, rounding_mode="floor") / (self.sections - 1)
        return torch.stack([rows[:, 0].double(), x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1).float()


class LayoutEncoder(ConditionEncoder):
    """Boxes -> `context` (B, L, D), with `use_mask` also `context_mask` (B, L). Null is a picture without objects.

    `tower`: see `TextEncoder`; its parameters have the official names (`transformer.token_emb.weight`, ...).
    """

    config_class = LayoutEncoderConfig

    def __init__(self, config: LayoutEncoderConfig, tower: nn.Module) -> None:
        super().__init__(config.field, {"context": config.width}, config.drop_rate, config.guidance_scale)
        if not config.classes:
            raise DarkroomError("boxes: no classes; give their names in `classes`")
        self.config, self.tower, self.tokens = config, tower, BoxTokens(config)

    @classmethod
    def build(cls, config: LayoutEncoderConfig, parts: Parts) -> LayoutEncoder:
        assert parts.transformer is not None
        tokens = BoxTokens(config)
        tower = parts.transformer(
            vocabulary_size=tokens.vocabulary_size,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            head_width=config.head_width,
            length=tokens.length,
            dropout=config.dropout,
        )
        if config.tokens is None:
            _order_places(tower, tokens)
        return cls(config, tower)

    def encode(self, values: Sequence[Tensor]) -> Conditioning:
        """B times (n, 5)."""
        device = next(self.tower.parameters()).device
        ids = torch.stack([self.tokens.encode(torch.as_tensor(boxes)) for boxes in values]).to(device)
        seen = None
        if self.config.use_mask:
            seen = ids != self.tokens.none
            seen[:, 0] = True  # attention needs something to look at
        return Conditioning(context=self.tower(ids, seen), context_mask=seen)

    def null(self, batch_size: int) -> Conditioning:
        return self.encode([torch.zeros(0, 5)]).map(lambda t: t.expand(batch_size, *t.shape[1:]))

    def encode_kept(self, values: Sequence[Tensor], keep: Tensor) -> Conditioning:
        return self.encode([b if kept else b[:0] for b, kept in zip(values, keep.tolist(), strict=True)])

    def augment(self, values: Sequence[Tensor], generator: torch.Generator) -> Sequence[Tensor]:
        if not self.config.shuffle:
            return values
        return [boxes[torch.randperm(len(boxes), generator=generator)] for boxes in values]

    def from_request(self, field: str, value: Any, size: tuple[int, int]) -> Tensor:
        """Boxes as {"class": name or number, "bbox": [x0, y0, x1, y1]}, as (class, x0, y0, x1, y1), or as an array
        (n, 5) with numbers for classes; coordinates are divided by width and height."""
        boxes = [value] if isinstance(value, dict) else value
        if isinstance(boxes, str) or not isinstance(boxes, Iterable):
            raise DarkroomError('boxes: give a list like [("circle", 0.1, 0.2, 0.5, 0.9)]')
        rows = [self._row(box) for box in boxes]
        if len(rows) > (most := self.config.max_objects):
            warn(f"{len(rows)} boxes for one image, but this model takes {most}: the last are left out")
        return torch.tensor(rows[:most], dtype=torch.float32).reshape(-1, 5)

    def _row(self, box: Any) -> list[float]:
        try:
            if isinstance(box, dict):
                box = [box["class"] if "class" in box else box["cls"], *box["bbox"]]
            name, *corners = box
            x0, y0, x1, y1 = (float(c) for c in corners)
        except (KeyError, TypeError, ValueError):
            raise DarkroomError(
                f'{box!r} is not a box; write {{"class": name, "bbox": [x0, y0, x1, y1]}} with numbers from 0 to 1'
            ) from None
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise DarkroomError(
                f"box {[x0, y0, x1, y1]} is not x0, y0, x1, y1 divided by width and height, from 0 to 1, with x0 < x1 "
                "and y0 < y1"
            )
        return [float(self._class(name)), x0, y0, x1, y1]

    def _class(self, name: Any) -> int:
        if isinstance(name, str) and name in self.config.classes:
            return self.config.classes.index(name)
        try:
            number = int(name)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < self.tokens.classes:
            classes = self.config.classes
            few = classes if len(classes) <= 8 else [*classes[:8], "..."]
            known = get_close_matches(str(name), classes, n=1, cutoff=0.5) or few
            raise DarkroomError(f"box class {name!r} is not known{nearest(str(name), known)}")
        return number

    def several(self, value: Any) -> bool:
        """A list of layouts: its first entry is no box."""
        if not isinstance(value, (list, tuple)) or not value:
            return False
        first = value[0]
        if isinstance(first, (list, tuple)):
            return not first or isinstance(first[0], (dict, list, tuple, np.ndarray, Tensor))
        return isinstance(first, (np.ndarray, Tensor)) and first.ndim == 2

    def record(self, field: str, value: Any) -> Any:
        names, count = self.config.classes, len(self.config.classes)
        return [
            {"class": names[int(row[0])] if row[0] < count else int(row[0]), "bbox": [round(v, 6) for v in row[1:]]}
            for row in value.tolist()
        ]


@torch.no_grad()
def _order_places(tower: Any, tokens: BoxTokens) -> None:
    """Start the embeddings of places as sines of their coordinates, unit size: neighbours begin alike, so that what is
    learned of one corner serves those around it. Training moves them freely."""
    embedding = tower.transformer.token_emb.weight
    if embedding.is_meta:
        return
    width = embedding.shape[1]
    octaves = max(1, min(5, width // 8))
    axis = torch.linspace(0, 1, tokens.sections)
    y, x = (a.flatten() for a in torch.meshgrid(axis, axis, indexing="ij"))
    angles = [2**k * math.pi / 2 * c for k in range(octaves) for c in (x, y)]
    waves = torch.stack([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)
    # A fixed rotation spreads the waves over all channels; the random state of the caller stays as it is.
    mix = torch.randn(waves.shape[1], width, generator=torch.Generator().manual_seed(0))
    rows = waves @ mix
    embedding[tokens.first_place : tokens.first_place + tokens.sections**2] = (rows / rows.std()).to(embedding)
