"""Where whole maps live while an image is worked through strip by strip: in memory, or in files that nobody sees.

Shapes: H W map size, C channels, n rows. Rows are (n, W, C): a strip is one block of memory or of a file, and a
convolution takes it as a channels_last view.
"""

from __future__ import annotations

import errno
import tempfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from darkroom.errors import DarkroomError


class Shape(NamedTuple):
    height: int
    width: int
    channels: int

    def bytes(self, itemsize: int) -> int:
        return self.height * self.width * self.channels * itemsize


class Source(ABC):
    """A map of which any rows can be had. They may be computed anew each time, so ask in order, from the top."""

    shape: Shape

    @property
    def widest(self) -> int:
        """Elements, at most, of any map that is computed for one row of this one."""
        return self.shape.width * self.shape.channels

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """(n, W, C) for start <= row < stop. Not to be written to."""

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """`rows` in parts, from the top, without the copy that joins them."""
        yield self.rows(start, stop)

    @abstractmethod
    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        """Each stored map behind this one, with the first of its rows that rows >= start still need."""


class StoredMap(Source):
    """Rows are written once, from the top, and may be dropped from the top."""

    held = 0  # bytes of memory

    def reads(self, start: int) -> Iterator[tuple[StoredMap, int]]:
        yield self, max(start, 0)

    @abstractmethod
    def append(self, rows: Tensor) -> None:
        """(n, W, C), the next rows."""

    @abstractmethod
    def release(self, below: int) -> None:
        """Rows < below are not needed any more."""

    def close(self) -> None:
        self.release(self.shape.height)


class MemoryMap(StoredMap):
    def __init__(self, shape: Shape, workspace: Workspace) -> None:
        self.shape, self._workspace = shape, workspace
        self._strips: list[Tensor | None] = []
        self._starts = [0]
        self._released = 0  # strips

    def append(self, rows: Tensor) -> None:
        if rows.untyped_storage().nbytes() > rows.nbytes:  # a part of something larger would keep all of it
            rows = rows.clone()
        self._strips.append(rows)
        self._starts.append(self._starts[-1] + len(rows))
        self.held += rows.nbytes
        self._workspace.used += rows.nbytes

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        i = bisect_right(self._starts, start) - 1
        while start < stop:
            first, last = self._starts[i], min(self._starts[i + 1], stop)
            strip = self._strips[i]
            assert strip is not None
            yield strip[start - first : last - first]
            start, i = last, i + 1

    def rows(self, start: int, stop: int) -> Tensor:
        parts = list(self.pieces(start, stop))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def release(self, below: int) -> None:
        while self._released < len(self._strips) and self._starts[self._released + 1] <= below:
            strip = self._strips[self._released]
            assert strip is not None
            self.held -= strip.nbytes
            self._workspace.used -= strip.nbytes
            self._strips[self._released] = None
            self._released += 1


class FileMap(StoredMap):
    """Read and written, not memory-mapped: pages of a mapped file would count as memory of this process."""

    def __init__(self, shape: Shape, file: FileIO) -> None:
        self.shape, self._file = shape, file
        self._like = torch.empty(0)

    def append(self, rows: Tensor) -> None:
        self._like = rows.new_empty(0)
        data = _bytes(rows.cpu().contiguous())
        self._file.seek(0, 2)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DarkroomError(
                "the folder for spilled activations is full (a map of "
                f"{self.shape.bytes(rows.element_size()) / 1e9:.1f} GB was being written): give a folder on a larger "
                "disk as spill, or raise memory_gb"
            ) from error

    def rows(self, start: int, stop: int) -> Tensor:
        _, width, channels = self.shape
        rows = torch.empty((stop - start, width, channels), dtype=self._like.dtype)
        data = _bytes(rows)
        self._file.seek(start * (rows.nbytes // max(stop - start, 1)))
        while data:
            count = self._file.readinto(data)
            if not count:
                raise DarkroomError("a file of spilled activations is shorter than what was written to it")
            data = data[count:]
        return rows.to(self._like.device)

    def release(self, below: int) -> None:
        if below >= self.shape.height:
            self._file.close()


class Workspace:
    """Makes maps: in memory up to `memory` bytes, else in unnamed files in `spill` (None: there are no files).

    The operating system removes the files when they are closed, at the latest when the process ends.
    """

    def __init__(self, memory: int, spill: Path | None) -> None:
        self.memory, self.used = memory, 0
        self.spilled = 0  # bytes, all files that were made
        self._spill, self._files = spill, ExitStack()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._files.close()

    def make(self, shape: Shape, itemsize: int, released: int = 0) -> StoredMap | None:
        """An empty map; `released` bytes of others will be dropped while it is written. None: there is no room."""
        size = shape.bytes(itemsize)
        if max(self.used, self.used - released + size) <= self.memory:
            return MemoryMap(shape, self)
        if self._spill is None:
            return None
        self.spilled += size
        return FileMap(shape, self._files.enter_context(tempfile.TemporaryFile(dir=self._spill, buffering=0)))


def _bytes(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(cast(Any, rows.view(torch.uint8).numpy().reshape(-1)))
