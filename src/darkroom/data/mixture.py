"""Several sources as one data set: files and `shapes` in one list, and "PATH@COUNT" for a part of a source."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from darkroom.data.locations import is_shapes, part_of
from darkroom.data.sources import DataConfig, ImageDataset
from darkroom.errors import DarkroomError


class MixtureDataset(ImageDataset):
    """The parts one behind the other. Of the fields only `image`, `text` and `sizes` are kept, the latter where every
    example has one: class numbers of different sources do not mean the same."""

    def __init__(self, config: DataConfig, split: str, open_part: Callable[[DataConfig, str], ImageDataset]) -> None:
        super().__init__(config, split)
        if config.limit is not None:
            raise DarkroomError('limit cuts one source; in a mixture say "PATH@COUNT" for each that is too large')
        self.parts = [open_part(part, side) for part, side in _parts(config, split)]
        kept = [name for name in ("text", "sizes") if self.parts and all(name in part.fields for part in self.parts)]
        self.fields = ("image", *kept)
        self.problems = [problem for part in self.parts for problem in part.problems]
        self._ends = list(accumulate(len(part) for part in self.parts))
        identity = [part.digest for part in self.parts]
        self.digest = hashlib.sha256(json.dumps(["mixture", *identity]).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, index: int) -> tuple[ImageDataset, int]:
        """Which part an example is of, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, number = self.place(index)
        example = part[number]
        return {name: example[name] for name in self.fields}

    def without_image(self, index: int, wanted: Collection[str] | None = None) -> dict[str, Any]:
        part, number = self.place(index)
        kept = set(self.fields) - {"image"}
        return part.without_image(number, kept if wanted is None else kept & set(wanted))

    def captions(self) -> list[str]:
        return [text for part in self.parts for text in part.captions()] if "text" in self.fields else []

    def describe(self) -> dict[str, Any]:
        parts = [{"source": part.config.source, "examples": len(part)} for part in self.parts]
        return super().describe() | {"parts": parts}


def _parts(config: DataConfig, split: str) -> list[tuple[DataConfig, str]]:
    """(settings, split) of each part: neighbouring shards of one folder without a count are read as one source."""
    named = config.validation if isinstance(config.validation, (str, list)) else None
    locations = config.source if named is None or split == "train" else named
    groups: list[tuple[list[str], int | None]] = []
    for location in [locations] if isinstance(locations, str) else list(locations):
        path, count = part_of(location)
        before = groups[-1] if groups else None
        together = before is not None and before[1] is None and Path(before[0][0]).parent == Path(path).parent
        if before is not None and together and count is None and not is_shapes(path) and not is_shapes(before[0][0]):
            before[0].append(path)
        else:
            groups.append(([path], count))
    parts = []
    for paths, count in groups:
        if is_shapes(paths[0]):
            # Flips would contradict its captions, and its validation scenes are of its own.
            changes: dict[str, Any] = {"source": paths[0], "validation": 0.05, "flip": False}
            parts.append((replace(config, **changes, count=count or config.count), split))
            continue
        # Files that are named for validation are wholly that; the others are wholly for training then.
        share = config.validation if named is None else 0.0
        changes = {"source": paths, "limit": count, "count": None, "validation": share}
        parts.append((replace(config, **changes), split if named is None else "train"))
    return parts
