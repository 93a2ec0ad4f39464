"""Weight files of either kind, looked at before they are read: names, shapes and dtypes first, numbers on demand.

So the first stage of a 4 GB checkpoint costs the memory of a first stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.config import understanding
from darkroom.errors import DarkroomError
from darkroom.safe_files import (
    PICKLED,
    SAFETENSORS,
    TORCH_NAMES,
    SafetensorsHeader,
    is_weight_file,
    iter_safetensors,
    read_safetensors_header,
)
from darkroom.safe_pickle import StoredTensor, iter_stored, read_structure, stored_table

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 4  # names in a message

__all__ = ["PICKLED", "SAFETENSORS", "TensorFile", "is_weight_file", "open_tensor_file", "opened", "some"]


def some(names: Iterable[str]) -> str:
    """The first few of these names, for a message."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


@dataclass(frozen=True)
class TensorFile:
    """A weight file. `shapes` and `dtypes` (torch's names) by tensor; `notes`: the strings stored beside them."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    notes: dict[str, str]
    stored: dict[str, StoredTensor] | None  # None: safetensors
    header: SafetensorsHeader | None = None  # of safetensors, read once

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU, in the dtype they are stored in, each with memory of its own."""
        return dict(self.iterate(names))

    def iterate(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The same one by one, in the order of the file: no more memory than for one tensor is taken at a time."""
        if self.stored is None:
            return iter_safetensors(self.path, set(names), self.header)
        return iter_stored(self.path, {name: self.stored[name] for name in names})


def opened(path: Path) -> TensorFile | None:
    """A weight file, to be looked at by several readers; None for a folder and for any other file."""
    with understanding(path, "a weight file"):
        return open_tensor_file(path) if path.is_file() and is_weight_file(path) else None


def open_tensor_file(path: Path) -> TensorFile:
    """Reads the header, or the pickle without its numbers; nothing in the file is executed."""
    if path.suffix.lower() == SAFETENSORS:
        header = read_safetensors_header(path)
        shapes = {name: entry.shape for name, entry in header.tensors.items()}
        dtypes = {name: TORCH_NAMES[entry.dtype] for name, entry in header.tensors.items()}
        return TensorFile(path, shapes, dtypes, header.metadata, None, header)
    if not is_weight_file(path):
        raise DarkroomError(f"{path} is not a weight file; known are {', '.join((SAFETENSORS, *PICKLED))}")
    content = read_structure(path)
    stored = stored_table(content)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    notes = {k: v for k, v in content.items() if isinstance(v, str)} if isinstance(content, dict) else {}
    return TensorFile(path, shapes, dtypes, notes, stored)
