"""What a loaded model carries of its source besides its own tensors, so that an export gives it back.

Small tensors are held. Large ones (perceptual networks, discriminators, depth estimators) stay in the file that they
came from and pass through when something is written: a loaded model takes no memory for them. A file that has changed
or gone by then is told of, and what it held is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from darkroom.errors import DarkroomError, warn
from darkroom.interop.content import Content
from darkroom.interop.found_model import KEPT_FILE
from darkroom.interop.tensor_file import TensorFile, open_tensor_file, some
from darkroom.interop.tensor_source import FileSource, JoinedSource, MemorySource, TensorSource
from darkroom.safe_files import stream_safetensors
from darkroom.safe_json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

CARRIED = 2**18  # elements of a tensor that a loaded model holds


class LeftInFiles:
    """Tensors of a source by names of ours, to be read when they are written."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        """names: ours -> the source's."""
        self._source, self._names = source, names
        self.shapes = {ours: source.shapes[theirs] for ours, theirs in names.items()}
        self.dtypes = {ours: source.dtypes[theirs] for ours, theirs in names.items()}
        self._stamps = {path: _stamp(path) for path in self.files(names)}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = {self._names[name]: name for name in names}
        return {wanted[theirs]: tensor for theirs, tensor in self._source.read(wanted).items()}

    def files(self, names: Iterable[str]) -> set[Path]:
        return self._source.files(self._names[name] for name in names)

    @property
    def lost(self) -> Path | None:
        """A file that is no longer what it was when the model was loaded."""
        return next((path for path, stamp in self._stamps.items() if stamp is None or _stamp(path) != stamp), None)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None for no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Kept:
    """tensors: small ones by their names in the source's layout; large: others by such names, in their files
    what:    they are, for people
    aliases: names whose tensor is another's; renamed: our names -> official ones that are not the usual; `FoundModel`
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    what: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    large: LeftInFiles | None = None

    @property
    def source(self) -> TensorSource:
        """All tensors that are there, by their names."""
        return (
            MemorySource(self.tensors) if self.large is None else JoinedSource(MemorySource(self.tensors), self.large)
        )


def keep(
    source: TensorSource,
    names: Mapping[str, str],
    what: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Kept | None:
    """names: of tensors in the source's layout -> in the source. None where there is nothing to keep."""
    if not (names or aliases or renamed):
        return None
    small = {name: theirs for name, theirs in names.items() if math.prod(source.shapes[theirs]) <= CARRIED}
    large = {name: theirs for name, theirs in names.items() if name not in small}
    tensors = source.read(small.values())
    return Kept(
        {name: tensors[theirs] for name, theirs in small.items()},
        dict(what or {}),
        dict(aliases or {}),
        dict(renamed or {}),
        LeftInFiles(source, large) if large else None,
    )


def reachable(kept: Kept | None) -> Kept:
    """Without large tensors whose file is no longer what it was, which is told in one line."""
    if kept is None:
        return Kept()
    if kept.large is None or (path := kept.large.lost) is None:
        return kept
    names = kept.large.shapes
    warn(
        f"{path} has changed or gone since the model was loaded, so {len(names)} tensor{'s' * (len(names) != 1)} that "
        f"only it holds ({some(names)}) are left out; load the model again, or use `darkroom convert` on the file"
    )
    return replace(kept, large=None)


def save_kept(folder: Path, kept: Kept | None) -> dict[str, str]:
    """Into a model folder; gives the SHA-256 of the file, if there is one."""
    if kept is None:
        return {}
    kept = reachable(kept)
    content = Content(copied={name: (kept.source, name) for name in kept.source.shapes})
    what = {name: kept.what[name] for name in content.copied if name in kept.what}
    return write_kept_file(folder, content, what, kept.aliases, kept.renamed)


def write_kept_file(
    folder: Path, content: Content, what: Mapping[str, str], aliases: Mapping[str, str], renamed: Mapping[str, str]
) -> dict[str, str]:
    path = folder / KEPT_FILE
    path.parent.mkdir()
    notes = {key: json.dumps(table) for key, table in (("what", what), ("aliases", aliases), ("renamed", renamed))}
    return {KEPT_FILE: stream_safetensors(path, content.entries(), content.produce, notes)}


def read_kept(folder: Path) -> Kept | None:
    """That of a model folder."""
    if not (folder / KEPT_FILE).is_file():
        return None
    file = open_tensor_file(folder / KEPT_FILE)
    what, aliases, renamed = kept_notes(file)
    return keep(FileSource([("", file)]), {name: name for name in file.shapes}, what, aliases, renamed)


def kept_notes(file: TensorFile) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """What the kept tensors are; official names with another's tensor; our names with unusual official ones."""
    try:
        tables = [parse_json(file.notes.get(key, "{}").encode()) for key in ("what", "aliases", "renamed")]
    except ValueError:
        tables = [None]
    if not all(isinstance(table, dict) and all(isinstance(v, str) for v in table.values()) for table in tables):
        raise DarkroomError(f"{file.path} is damaged: its tables of names cannot be read; convert the model again")
    what, aliases, renamed = tables
    copied = dict.fromkeys(aliases, "first stage, listed again")
    return {name: what.get(name, "kept") for name in file.shapes} | copied, aliases, renamed
