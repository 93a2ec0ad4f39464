"""Where the tensors of a model come from: weight files, or memory; and where in there each of ours stands.

A source is looked at before it is read: names, shapes and dtypes first, numbers on demand and in groups, so that a
model is filled without a second copy of it. In a source of several files a name begins with the folder of its part:
"unet/conv_in.weight".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from darkroom.errors import DarkroomError
from darkroom.interop.tensor_file import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Form = Literal["same", "transposed", "swapped", "repeated", "heads"]
GROUP_BYTES = 256 * 2**20  # read at once
BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2,
         "int16": 2}  # fmt: skip


class TensorSource(Protocol):
    """Names with shapes and dtypes (torch's names), and the numbers on demand."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def dtypes(self) -> Mapping[str, str]: ...
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU, in the dtype they are stored in."""
        ...

    def files(self, names: Iterable[str]) -> set[Path]:
        """Where they are read from, of those that are in files."""
        ...


class FileSource:
    """Weight files, each under a prefix of its names ("" for a single file)."""

    def __init__(self, files: Iterable[tuple[str, TensorFile]]) -> None:
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for prefix, file in files:
            for name, shape in file.shapes.items():
                full = prefix + name
                if full in self._places:
                    raise DarkroomError(f"{file.path} and {self._places[full][0].path} both hold {name!r}")
                self.shapes[full], self.dtypes[full] = shape, file.dtypes[name]
                self._places[full] = (file, name)

    def joined(self, other: FileSource) -> FileSource:
        """The tensors of both, whose names differ."""
        both = FileSource([])
        for source in (self, other):
            both.shapes |= source.shapes
            both.dtypes |= source.dtypes
            both._places |= source._places
        return both

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, tuple[TensorFile, dict[str, str]]] = {}
        for full in names:
            file, name = self._places[full]
            by_file.setdefault(file.path, (file, {}))[1][name] = full
        result: dict[str, Tensor] = {}
        for file, wanted in by_file.values():
            result |= {wanted[name]: tensor for name, tensor in file.read(wanted).items()}
        return result

    def files(self, names: Iterable[str]) -> set[Path]:
        return {self._places[name][0].path for name in names}


class MemorySource:
    """Tensors at hand: those of a model that is to be written."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._tensors[name].detach().cpu() for name in names}

    def files(self, names: Iterable[str]) -> set[Path]:
        return set()


@dataclass(frozen=True)
class Made:
    """A float32 tensor that is computed when it is wanted: configs of strangers state its size, and weights are
    compared with that before memory is taken."""

    shape: Shape
    make: Callable[[], Tensor]


class MadeSource:
    """Tensors that theirs computes or leaves out, and ours stores."""

    def __init__(self, made: Mapping[str, Made]) -> None:
        self._made = made
        self.shapes = {name: one.shape for name, one in made.items()}
        self.dtypes = dict.fromkeys(made, "float32")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._made[name].make() for name in names}

    def files(self, names: Iterable[str]) -> set[Path]:
        return set()


class JoinedSource:
    """Several sources whose names differ."""

    def __init__(self, *sources: TensorSource) -> None:
        self._sources = sources
        self.shapes = {name: shape for source in sources for name, shape in source.shapes.items()}
        self.dtypes = {name: dtype for source in sources for name, dtype in source.dtypes.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        result: dict[str, Tensor] = {}
        for source in self._sources:
            result |= source.read([name for name in wanted if name in source.shapes])
        return result

    def files(self, names: Iterable[str]) -> set[Path]:
        wanted = list(names)
        return {path for s in self._sources for path in s.files(name for name in wanted if name in s.shapes)}


def size_of(source: TensorSource, name: str) -> int:
    """In bytes."""
    return math.prod(source.shapes[name]) * BYTES.get(source.dtypes[name], 1)


# --------------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours stands in a source.

    names: the source's; several are joined along the rows
    form:  "same" (also in another shape of as many numbers: a 1x1 convolution is a matrix), "transposed", "swapped"
           (the halves of the rows are the other way round), "repeated" (all of them are the same tensor), "heads"
           (the rows of all of them in turn for one head after the other, as plain attention packs q, k and v)
    part:  (i, n): ours is the i-th of n equal parts of the rows of that one tensor
    shape: of theirs, for writing; None: that of ours
    heads: of the form of that name
    """

    names: tuple[str, ...]
    form: Form = "same"
    part: tuple[int, int] | None = None
    shape: Shape | None = None
    heads: int = 1


def same(name: str) -> Place:
    return Place((name,))


Table = Mapping[str, Place]  # our name: where it stands


def fits(place: Place, shape: Shape, shapes: Mapping[str, Shape]) -> bool:
    """Whether what stands there can be ours of this shape; all its names are in `shapes`."""
    theirs = [shapes[name] for name in place.names]
    if place.form == "transposed":
        return theirs == [shape[::-1]] and len(shape) == 2
    if place.part is not None:
        rows, left = divmod(theirs[0][0] if theirs[0] else 0, place.part[1])
        return not left and (rows, *theirs[0][1:]) == shape
    if place.form == "repeated":
        return all(_squeezed(other) == _squeezed(shape) for other in theirs)
    if place.form == "heads":
        third = (shape[0] // len(theirs), *shape[1:])
        return all(_squeezed(other) == _squeezed(third) for other in theirs) and not third[0] % place.heads
    if len(theirs) > 1:
        rows = sum(other[0] if other else 0 for other in theirs)
        return all(other[1:] == shape[1:] for other in theirs) and (rows, *theirs[0][1:]) == shape
    return theirs[0] == shape or (_squeezed(theirs[0]) == _squeezed(shape))


def _squeezed(shape: Shape) -> Shape:
    """Without ones at the end: of a matrix and of a 1x1 convolution the same."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def taken(place: Place, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """Ours, out of what the source holds. "repeated" ones must agree."""
    import torch

    theirs = [tensors[name] for name in place.names]
    if place.form == "transposed":
        return theirs[0].t()
    if place.form == "swapped":
        return torch.cat(theirs[0].chunk(2)[::-1])
    if place.part is not None:
        return theirs[0].chunk(place.part[1])[place.part[0]].reshape(shape)
    if place.form == "repeated":
        differing = [name for name, other in zip(place.names, theirs, strict=True) if not torch.equal(other, theirs[0])]
        if differing:
            raise DarkroomError(f"{place.names[0]} and {differing[0]} should be one tensor and differ")
        return theirs[0].reshape(shape)
    if place.form == "heads":
        return torch.stack([other.unflatten(0, (place.heads, -1)) for other in theirs], dim=1).reshape(shape)
    return (theirs[0] if len(theirs) == 1 else torch.cat(theirs)).reshape(shape)


@dataclass(frozen=True)
class Target:
    """A tensor to be written: its shape and dtype, and how it is made of ours; the inverse of `taken`."""

    shape: Shape
    dtype: str
    needs: tuple[str, ...]  # names of ours; several are the parts of one of theirs, in order
    form: Form
    piece: tuple[int, int]  # which of how many equal parts of the rows
    heads: int = 1

    def made(self, ours: Mapping[str, Tensor]) -> Tensor:
        import torch

        if len(self.needs) > 1:
            return torch.cat([ours[name] for name in self.needs]).reshape(self.shape)
        tensor = ours[self.needs[0]]
        if self.form == "transposed":
            return tensor.t()
        if self.form == "swapped":
            return torch.cat(tensor.chunk(2)[::-1])
        index, count = self.piece
        if self.form == "heads":
            return tensor.unflatten(0, (self.heads, count, -1))[:, index].reshape(self.shape)
        return (tensor if count == 1 else tensor.chunk(count)[index]).reshape(self.shape)


def inverse(table: Table, shapes: Mapping[str, Shape], dtypes: Mapping[str, str]) -> dict[str, Target]:
    """By their name: how it is made of ours, of these shapes and dtypes."""
    result: dict[str, Target] = {}
    parts: dict[str, dict[int, str]] = {}
    for ours, place in table.items():
        for index, name in enumerate(place.names):
            if place.part is not None:
                parts.setdefault(name, {})[place.part[0]] = ours
            elif name in result:
                raise DarkroomError(f"{ours} and {result[name].needs[0]} would both be written as {name}")
            piece = (0, 1) if place.form == "repeated" else (index, len(place.names))
            shape = _their_shape(place, shapes[ours])
            result[name] = Target(shape, dtypes[ours], (ours,), place.form, piece, place.heads)
    for name, found in parts.items():
        result[name] = replace(result[name], needs=tuple(found[index] for index in sorted(found)))
    return result


def _their_shape(place: Place, shape: Shape) -> Shape:
    if place.shape is not None:
        return place.shape
    if place.form == "transposed":
        return shape[::-1]
    if place.part is not None:
        return (shape[0] * place.part[1], *shape[1:])
    if place.form == "repeated":
        return shape
    return (shape[0] // len(place.names), *shape[1:]) if len(place.names) > 1 else shape


def groups(source: TensorSource, table: Table, limit: int = GROUP_BYTES) -> Iterator[list[str]]:
    """Our names in groups of about `limit` bytes, so that little is in memory twice."""
    batch: list[str] = []
    size = 0
    for ours, place in table.items():
        more = sum(size_of(source, name) for name in place.names)
        if batch and size + more > limit:
            yield batch
            batch, size = [], 0
        batch.append(ours)
        size += more
    if batch:
        yield batch


def read_table(source: TensorSource, table: Table, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor of our shape in the source's dtype), group by group."""
    for group in groups(source, table):
        tensors = source.read(dict.fromkeys(name for ours in group for name in table[ours].names))
        for ours in group:
            yield ours, taken(table[ours], tensors, shapes[ours])
