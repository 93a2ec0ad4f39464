"""Reading files that may be damaged or hostile, and writing files that are either whole or absent.

Reading: the header of a safetensors file is checked against the file before any memory is taken for tensors.
Writing: everything goes to a temporary name beside its destination, is flushed to the disk and then renamed.
Pickled checkpoints are read by `safe_pickle`, which executes nothing.
torch is imported inside the functions that make tensors, so that headers can be looked at within milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import DarkroomError
from darkroom.safe_json import MAX_BYTES, parse_json

if TYPE_CHECKING:
    from torch import Tensor

# safetensors dtype: (bytes per element, name in torch)
_DTYPES = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
_DTYPE_NAMES = {torch_name: name for name, (_, torch_name) in _DTYPES.items()}
TORCH_NAMES = {name: torch_name for name, (_, torch_name) in _DTYPES.items()}  # "BF16": "bfloat16"


# Weight files are known by the end of their names.
SAFETENSORS = ".safetensors"
PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
START_BYTES = 64  # of a file, enough to tell text
MAX_DIMENSIONS = 8  # no layer has more; the product of many large sizes takes time quadratic in their number


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file; `start` and `end` count bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsHeader:
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]

    @property
    def numel(self) -> int:
        return sum(entry.numel for entry in self.tensors.values())


@contextlib.contextmanager
def open_for_reading(path: Path) -> Iterator[tuple[io.BufferedReader, int]]:
    """The open file and its size; what the operating system refuses becomes one line."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # opening says what is wrong
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise DarkroomError(f"{path} is a folder, a file was expected")
    if not stat.S_ISREG(mode):  # a pipe would wait for ever, a device may have no end
        raise DarkroomError(f"{path} is a pipe or a device, a file was expected")
    if "\0" in str(path):
        raise DarkroomError(f"{path} cannot be the name of a file")
    try:
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DarkroomError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise DarkroomError(f"cannot read {path}: {error.strerror or error}") from None


def write_json(path: Path, value: Any) -> None:
    """A JSON file for people to read, whole or not at all; what JSON has no word for is written as its text."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def read_json(path: Path | str, what: str = "JSON file") -> dict[str, Any]:
    """A JSON object from a file; `what` names the file in messages."""
    path = Path(path)
    with open_for_reading(path) as (file, _):
        data = file.read(MAX_BYTES + 1)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise DarkroomError(f"{path} is not a readable {what}: {error}") from None
    if not isinstance(value, dict):
        raise DarkroomError(f"{path} is not a readable {what}: it holds no JSON object")
    return value


def file_inside(folder: Path, name: str, where: object) -> Path:
    """The file of that name in a folder. `where` names it: it must not lead out of the folder, nor into another one."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
        raise DarkroomError(f"{where} names the file {name!r}; the name of a file beside it was expected")
    return folder / name


def read_safetensors_header(path: Path | str) -> SafetensorsHeader:
    """Names, shapes and places of all tensors, checked: they fill the file exactly, without gap or overlap."""
    path = Path(path)
    with open_for_reading(path) as (file, size):
        return _parse_header(path, file, size)


def _parse_header(path: Path, file: io.BufferedReader, size: int) -> SafetensorsHeader:
    again = "copy or download it again"
    start = file.read(START_BYTES)
    if size < 8:
        said = instead_of_weights(start) if start else again
        raise DarkroomError(f"{path} is not a safetensors file: it has {size} bytes; {said}")
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_BYTES:
        raise DarkroomError(
            f"{path} is not a safetensors file, its first 8 bytes are no header length: {instead_of_weights(start)}"
        )
    file.seek(8)
    if 8 + length > size:
        raise DarkroomError(f"{path} is truncated: its header needs {8 + length} bytes, the file has {size}; {again}")

    def bad(problem: str) -> DarkroomError:
        return DarkroomError(f"{path} is not a valid safetensors file: {problem}; {again}")

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise bad("its header names something twice")
        return dict(pairs)

    try:
        header = parse_json(file.read(length), without_repeats)
    except ValueError:
        raise bad("its header is not JSON, or of an impossible size") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("its metadata is not a table of strings")

    tensors: dict[str, TensorEntry] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise bad(f"tensor {name!r} lacks dtype, shape or data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (isinstance(entry["dtype"], str) and entry["dtype"] in _DTYPES):
            raise bad(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
        if not (natural_numbers(shape) and natural_numbers(offsets) and len(offsets) == 2):
            raise bad(f"tensor {name!r} has a shape or offsets that are not natural numbers")
        if len(shape) > MAX_DIMENSIONS:
            raise bad(f"tensor {name!r} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[entry["dtype"]][0]:
            raise bad(f"tensor {name!r} of shape {shape} does not fit its {offsets[1] - offsets[0]} bytes")
        tensors[name] = TensorEntry(entry["dtype"], tuple(shape), 8 + length + offsets[0], 8 + length + offsets[1])

    end = 8 + length
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise bad(f"tensor {name!r} does not begin where the one before it ends")
        end = entry.end
    if size < end:
        raise DarkroomError(f"{path} is truncated: its header promises {end} bytes, the file has {size}; {again}")
    if size > end:
        raise bad(f"{size - end} bytes follow the last tensor")
    return SafetensorsHeader(tensors, metadata)


def is_weight_file(path: Path) -> bool:
    return path.suffix.lower() in (SAFETENSORS, *PICKLED)


def instead_of_weights(start: bytes) -> str:
    """What a file that begins so holds in the place of weights, and what to do about it."""
    if start[8:10] == b'{"':
        return "it is a safetensors file by another name: give it a name that ends in .safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "it is a zip file; if torch wrote it, give it a name that ends in .ckpt"
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        return "it is a picture; give a weight file (.safetensors or .ckpt)"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, which stands for the file: run `git lfs pull`, or download the file itself"
    if text[:64].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page: download the file itself (its site may ask for a log-in or a licence first)"
    if text and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in text):
        return "it holds text; give a weight file (.safetensors or .ckpt), or download it again"
    return "copy or download it again"


def natural_numbers(values: Any) -> bool:
    """Whether it is a list of them, each small enough for a size or a place in a file."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def read_safetensors(path: Path | str, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """All tensors, or those of these names, on the CPU, in the dtype they are stored in.

    The header is checked before memory is taken.
    """
    return dict(iter_safetensors(path, names))


def iter_safetensors(
    path: Path | str, names: Collection[str] | None = None, header: SafetensorsHeader | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The same one by one, in the order of the file: memory is taken for a tensor only when it is asked for.

    header: of this file, where it was read before.
    """
    path = Path(path)
    with open_for_reading(path) as (file, size):
        if header is None:
            header = _parse_header(path, file, size)
        elif size != max((entry.end for entry in header.tensors.values()), default=size):
            raise DarkroomError(f"{path} changed while it was read; try again")
        chosen = header.tensors if names is None else {name: header.tensors[name] for name in names}
        for name, entry in sorted(chosen.items(), key=lambda item: item[1].start):
            raw = read_bytes(file, entry.start, entry.end - entry.start)
            if raw is None:
                raise DarkroomError(f"{path} became shorter while it was read; try again")
            yield name, as_dtype(raw, _DTYPES[entry.dtype][1]).view(entry.shape)
            del raw  # nothing is held while the next one is read


def as_dtype(raw: Tensor, dtype: str) -> Tensor:
    """Bytes as numbers. A bool that is neither 0 nor 1 is undefined in C++, so bools are compared instead."""
    import torch

    wanted = getattr(torch, dtype)
    return raw != 0 if wanted == torch.bool else raw.view(wanted)


def read_numbers(path: Path | str, name: str) -> list[float]:
    """The values of one small float32 or float64 tensor, without torch."""
    path = Path(path)
    with open_for_reading(path) as (file, size):
        entry = _parse_header(path, file, size).tensors.get(name)
        kind = {"F32": "f", "F64": "d"}.get("" if entry is None else entry.dtype)
        if entry is None or kind is None or entry.numel > 65536:
            raise DarkroomError(f"{path} holds no numbers {name!r} that can be shown")
        file.seek(entry.start)
        return list(struct.unpack(f"<{entry.numel}{kind}", file.read(entry.end - entry.start)))


CHUNK = 8 * 2**20


def read_bytes(
    file: io.BufferedReader, start: int, count: int, seen: Callable[[memoryview], None] = lambda part: None
) -> Tensor | None:
    """(count,) uint8, or None when the file ends before. `seen` is given each part once it is there."""
    import torch

    raw = torch.empty(count, dtype=torch.uint8)
    file.seek(start)
    view = raw.numpy().data
    while view:
        done = file.readinto(view[:CHUNK])
        if not done:
            return None
        seen(view[:done])
        view = view[done:]
    return raw


# ------------------------------------------------------------------------------------------------------------ writing


def save_error(path: Path, error: OSError) -> DarkroomError:
    """What the operating system refused, as one line with the cure."""
    cure = "choose another place with -o or --output"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "free some space or choose another place"
    return DarkroomError(f"cannot save {path}: {error.strerror or error}; nothing was left behind, {cure}")


def _temporary_beside(path: Path) -> Path:
    """A new hidden name in the same folder: a rename is only atomic within one file system."""
    return path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a temporary file that may not even have been made."""
    with contextlib.suppress(OSError):
        path.unlink()


def write_file(path: Path | str, data: bytes) -> None:
    """Replace `path` by `data`, atomically: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise save_error(path, error) from None
    finally:
        discard(temporary)


def write_safetensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write one file (not atomic by itself: use it inside `new_folder`, which also flushes); gives its SHA-256.

    Equal input gives equal bytes.
    """
    entries = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    return stream_safetensors(path, entries, lambda names: ((name, tensors[name]) for name in names), metadata)


def stream_safetensors(
    path: Path | str,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    produce: Callable[[list[str]], Iterable[tuple[str, Tensor]]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """As `write_safetensors`, of tensors that are not all in memory: `entries` has dtype (torch's name) and shape of
    each, and `produce(names)` gives them one after the other in the order that it is told."""
    import torch

    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    sizes = {name: _DTYPES[_DTYPE_NAMES[dtype]][0] for name, (dtype, _) in entries.items()}
    # Widest elements first, as the reference implementation does: every tensor is then aligned to its element size.
    names = sorted(entries, key=lambda name: (-sizes[name], name))
    end = 0
    for name in names:
        dtype, shape = entries[name]
        start, end = end, end + math.prod(shape) * sizes[name]
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with open(path, "xb") as file:

        def put(data: Any) -> None:
            digest.update(data)
            file.write(data)

        put(struct.pack("<Q", len(text)))
        put(text)
        for wanted, (name, tensor) in zip(names, produce(names), strict=True):
            is_right = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) == entries[name]
            assert name == wanted and is_right, f"{name} is not what was announced"
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            put(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file."""
    path = Path(path)
    with open_for_reading(path) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_file(destination: Path | str, replaces: Callable[[Path], bool] = lambda old: False) -> Iterator[Path]:
    """A temporary path to write; on success it takes the place of `destination` in one rename, else it vanishes.

    A file that is already there is replaced only if `replaces(old)` agrees.
    """
    destination = Path(os.path.realpath(destination))
    if destination.is_dir():
        raise DarkroomError(f"cannot save to {destination}: it is a folder, the name of a file was expected")
    if destination.exists() and not replaces(destination):
        raise DarkroomError(f"cannot save to {destination}: another file has that name; choose a new name")
    # Of the same kind by its suffix, so that it can be read again before it takes its place.
    temporary = Path(f"{_temporary_beside(destination)}{destination.suffix}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, destination)
        _sync(destination.parent)
    except OSError as error:
        raise save_error(destination, error) from None
    finally:
        discard(temporary)


@contextlib.contextmanager
def new_folder(destination: Path | str, replaces: Callable[[Path], bool] = lambda old: False) -> Iterator[Path]:
    """A temporary folder to fill; on success it takes the place of `destination` in one rename, else it vanishes.

    A folder that is already there is replaced only if it is empty or `replaces(old)` agrees.
    """
    destination = Path(os.path.realpath(destination))
    if destination.exists():
        if not destination.is_dir():
            raise DarkroomError(f"cannot save to {destination}: it is a file, a folder was expected")
        if any(destination.iterdir()) and not replaces(destination):
            raise DarkroomError(f"cannot save to {destination}: the folder holds other files; choose a new folder")
    temporary = _temporary_beside(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in (*names, "."):
                _sync(Path(folder) / name)
        if destination.exists():
            _exchange(temporary, destination)  # `temporary` now holds the old folder and is removed below
        else:
            os.rename(temporary, destination)
        _sync(destination.parent)
    except OSError as error:
        raise save_error(destination, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders: one atomic call on Linux; elsewhere three renames, the old folder restored on failure."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is not None:
        at_current_folder, rename_exchange = -100, 2
        if renameat2(at_current_folder, os.fsencode(one), at_current_folder, os.fsencode(other), rename_exchange) == 0:
            return
    aside = _temporary_beside(other)
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)
