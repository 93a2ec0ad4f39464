"""What a written file will hold, before anything is read: each tensor's name, shape, dtype, and what it is made of.

The numbers then pass through in groups, so that a model of any size is converted in little memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from darkroom.interop.tensor_source import (
    GROUP_BYTES,
    Shape,
    Table,
    Target,
    TensorSource,
    inverse,
    size_of,
    taken,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Made:
    """A tensor made of ours, which stand in `source` where `table` says."""

    target: Target
    source: TensorSource
    table: Table
    shapes: Mapping[str, Shape]  # of ours


@dataclass
class Content:
    """Names -> tensors of a file to be written."""

    made: dict[str, _Made] = field(default_factory=dict)
    copied: dict[str, tuple[TensorSource, str]] = field(default_factory=dict)  # as they are, from there
    ready: dict[str, Tensor] = field(default_factory=dict)

    def add(self, targets: Table, source: TensorSource, table: Table, shapes: Mapping[str, Shape]) -> None:
        """Our tensors, which stand in the source where `table` says, go where `targets` says."""
        dtypes = {ours: source.dtypes[place.names[0]] for ours, place in table.items()}
        for name, target in inverse(targets, shapes, dtypes).items():
            self.made[name] = _Made(target, source, table, shapes)

    def entries(self) -> dict[str, tuple[str, Shape]]:
        """dtype and shape by name."""
        result = {name: (made.target.dtype, made.target.shape) for name, made in self.made.items()}
        result |= {name: (source.dtypes[n], source.shapes[n]) for name, (source, n) in self.copied.items()}
        return result | {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in self.ready.items()}

    def produce(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors one after the other, read in groups."""
        group: list[str] = []
        size = 0
        for name in names:
            needed = self._needed(name)
            more = sum(size_of(source, n) for source, n in needed)
            if group and size + more > GROUP_BYTES:
                yield from self._read(group)
                group, size = [], 0
            group.append(name)
            size += more
        yield from self._read(group)

    def _needed(self, name: str) -> list[tuple[TensorSource, str]]:
        if name in self.copied:
            return [self.copied[name]]
        if name in self.ready:
            return []
        made = self.made[name]
        return [(made.source, n) for ours in made.target.needs for n in made.table[ours].names]

    def _read(self, group: list[str]) -> Iterator[tuple[str, Tensor]]:
        by_source: dict[int, tuple[TensorSource, dict[str, None]]] = {}
        for name in group:
            for source, needed in self._needed(name):
                by_source.setdefault(id(source), (source, {}))[1][needed] = None
        read = {key: source.read(names) for key, (source, names) in by_source.items()}
        for name in group:
            if name in self.ready:
                yield name, self.ready[name]
            elif name in self.copied:
                source, needed = self.copied[name]
                yield name, read[id(source)][needed]
            else:
                made = self.made[name]
                tensors = read[id(made.source)]
                ours = {o: taken(made.table[o], tensors, made.shapes[o]) for o in made.target.needs}
                yield name, made.target.made(ours)
