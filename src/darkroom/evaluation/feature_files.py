"""What was seen in many images, in files of a fixed number of images each: the unit in which work is divided among
processes, kept when it is interrupted, and read again without ever being in memory as a whole.

A part holds the images of one batch, so that the batches, and with them the last digits of every number, are the same
however often the work was interrupted and by however many processes it was done.
Shapes: N images, B images of a part, D width of an embedding, K classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from darkroom.data.locations import spread
from darkroom.errors import DarkroomError
from darkroom.evaluation.extractors import Extractor
from darkroom.evaluation.metrics import Moments
from darkroom.safe_files import discard, read_safetensors, read_safetensors_header, write_safetensors

EMBEDDING, PROBABILITIES = "embedding", "probabilities"
Values = dict[str, Tensor]  # by name, (B,) one number for each image; not a number: does not apply
Report = Callable[[int], None]  # called with the number of images that a part had


@dataclass(frozen=True)
class Pictures:
    """uint8 (B, H, W, 3) images, numbers that are known of each, and a digest of what they were asked to show."""

    images: Tensor
    values: Values
    conditions: str = ""


class PictureSource(Protocol):
    """Images by number; always the same for the same numbers."""

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> Pictures: ...


class FeatureFiles:
    """The parts of one set of `count` images in `folder`, `part` images each but the last."""

    def __init__(self, folder: Path, count: int, part: int) -> None:
        self.folder, self.count, self.part = folder, count, part
        self.starts = list(range(0, count, part))

    def file(self, start: int) -> Path:
        return self.folder / f"{start:08d}.safetensors"

    def numbers(self, start: int) -> list[int]:
        """The images of a part."""
        return list(range(start, min(start + self.part, self.count)))

    def missing(self, rank: int = 0, size: int = 1) -> list[int]:
        """The parts that are not there yet, of those that are this process's share."""
        return [start for start in self.starts[rank::size] if not self.file(start).is_file()]

    def write(self, start: int, tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> None:
        """One part, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{start:08d}.{os.getpid()}.part"
        try:
            write_safetensors(temporary, tensors, digests)
            os.replace(temporary, self.file(start))
        finally:
            discard(temporary)

    def parts(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The tensors of these names, part by part in the order of the images."""
        for start in self.starts:
            yield read_safetensors(self.file(start), names)

    def moments(self, width: int) -> Moments:
        """Mean and covariance of the embeddings."""
        result = Moments(width)
        for part in self.parts([EMBEDDING]):
            result.update(part[EMBEDDING])
        return result

    def some(self, name: str, most: int) -> Tensor:
        """(n, ...) of at most `most` images, evenly spread: all that is ever held at once."""
        wanted = spread(self.count, most)
        rows: list[Tensor] = []
        place = 0
        for start in self.starts:
            numbers = self.numbers(start)
            here = []
            while place < len(wanted) and wanted[place] <= numbers[-1]:
                here.append(wanted[place] - start)
                place += 1
            if here:
                rows.append(read_safetensors(self.file(start), [name])[name][here])
        return torch.cat(rows)

    def value(self, name: str) -> Tensor:
        """(N,) float32: a number for each image, four bytes each."""
        return torch.cat([part[name] for part in self.parts([name])])

    @property
    def names(self) -> list[str]:
        """The names of all tensors of a part."""
        return sorted(read_safetensors_header(self.file(0)).tensors)

    def digest(self, of: str = "pixels") -> str:
        """SHA-256 over the parts' digests of their pixels, or of their "conditions"; empty where there are none."""
        found = [read_safetensors_header(self.file(start)).metadata[of] for start in self.starts]
        return hashlib.sha256("".join(found).encode()).hexdigest() if any(found) else ""


def observe(
    source: PictureSource,
    files: FeatureFiles,
    extractor: Extractor | None,
    *,
    rank: int = 0,
    size: int = 1,
    report: Report | None = None,
    keep: Callable[[Sequence[int], Tensor], None] | None = None,
) -> None:
    """Look at this process's share of the parts that are not there yet.

    keep: is handed the numbers and the images (B, H, W, 3) of each part that is made.
    """
    todo = set(files.missing(rank, size))
    for start in files.starts[rank::size]:
        numbers = files.numbers(start)
        if start in todo:
            pictures = source.read(numbers)
            tensors: dict[str, Tensor] = {}
            if extractor is not None:
                features = extractor(pictures.images)
                if not bool(features.embedding.isfinite().all()):
                    raise DarkroomError(
                        f'extractor "{extractor.name}" gives values that are not finite; its weights are damaged'
                    )
                tensors[EMBEDDING] = features.embedding.contiguous()
                if features.probabilities is not None:
                    tensors[PROBABILITIES] = features.probabilities.contiguous()
            tensors |= {name: value.float().contiguous() for name, value in pictures.values.items()}
            pixels = hashlib.sha256(pictures.images.contiguous().numpy().data).hexdigest()
            if keep is not None:
                keep(numbers, pictures.images)
            files.write(start, tensors, {"pixels": pixels, "conditions": pictures.conditions})
        if report is not None:
            report(len(numbers))
