"""Pickled checkpoints read as data.

torch writes a zip with `data.pkl` (the structure) and one uncompressed entry per storage (the numbers). The pickle is
read by `pickle_program`, which can neither import nor call; numbers are left in the file until they are wanted.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import DarkroomError
from darkroom.pickle_program import MAX_PICKLE_BYTES, Global, run_pickle
from darkroom.safe_files import (
    MAX_DIMENSIONS,
    START_BYTES,
    as_dtype,
    instead_of_weights,
    natural_numbers,
    open_for_reading,
    read_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# One storage takes about 100 bytes of the table at the end of the archive.
MAX_DIRECTORY_BYTES = 4 * 2**20
_TAIL_BYTES = 2**16 + 22 + 20 + 56  # the longest comment, and the three records that may end an archive
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of an entry: signature, ..., bytes of its name and of its extra field


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint whose numbers have not been read: a strided view of a storage."""

    storage: str
    dtype: str  # torch's name of it
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def read_checkpoint(path: Path | str) -> Any:
    """The object in a torch zip file (.ckpt, .pt, .pth, .bin): nested plain containers of tensors, on the CPU.

    Nothing in the file is executed: a name other than those that tensors and dictionaries need is refused and shown.
    """
    with _opened(Path(path)) as checkpoint:
        return checkpoint.load(checkpoint.tensor)


def read_structure(path: Path | str) -> Any:
    """As `read_checkpoint`, with a `StoredTensor` in the place of every tensor: no numbers are read."""
    with _opened(Path(path)) as checkpoint:
        return checkpoint.load(lambda stored: stored)


def read_stored(path: Path | str, wanted: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """These tensors of a checkpoint, each with memory of its own; `wanted` comes from `read_structure` of that file."""
    return dict(iter_stored(path, wanted))


def iter_stored(path: Path | str, wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """The same one by one, in the order of the file: memory is taken for a tensor only when it is asked for."""
    with _opened(Path(path)) as checkpoint:
        for name, stored in sorted(wanted.items(), key=lambda item: checkpoint.place(item[1])):
            yield name, checkpoint.alone(stored)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_TorchZip]:
    with open_for_reading(path) as (file, size):
        if size == 0:
            raise DarkroomError(f"{path} is empty; copy or download it again")
        start = file.read(START_BYTES)
        file.seek(0)
        if start[:2] != b"PK":
            if start[:1] in (b"\x80", b"(", b"c", b"}", b"]"):
                _refuse_plain_pickle(path, file)
            raise DarkroomError(f"{path} is not a checkpoint of torch: {instead_of_weights(start)}")
        if _directory_bytes(file, size) > MAX_DIRECTORY_BYTES:
            raise DarkroomError(f"{path} is a zip file of too many entries; not a model")
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError, struct.error) as error:
            raise DarkroomError(f"{path} is damaged or truncated ({error}); copy or download it again") from None
        try:
            with archive:
                yield _TorchZip(path, archive, file, size)
        except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
            raise DarkroomError(f"{path} is damaged or truncated ({error}); copy or download it again") from None


def _directory_bytes(file: io.BufferedReader, size: int) -> int:
    """What the end of a zip file says of the size of its table of entries (APPNOTE.TXT 4.3.14 to 4.3.16), which the
    library makes into objects at once. 0 where there is no such end, which the library reports.

    Bytes that look like the end may stand behind it, in a comment: of all of them the largest size counts.
    """
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    sizes = [0]
    for match in re.finditer(re.escape(b"PK\5\6"), tail):
        end = match.start()
        if end + 22 <= len(tail):
            sizes += struct.unpack_from("<I", tail, end + 12)
        if end >= 20 and tail[end - 20 : end - 16] == b"PK\6\7":  # of the 64-bit form, which then counts instead
            (place,) = struct.unpack_from("<Q", tail, end - 12)
            if place + 56 <= size:
                file.seek(place)
                sizes[-1:] = struct.unpack_from("<Q", file.read(56), 40)
    file.seek(0)
    return max(sizes)


def _refuse_plain_pickle(path: Path, file: io.BufferedReader) -> None:
    """Pickles outside a torch zip hold no weights that we could read; the message names the code in them, if any."""
    data = io.BytesIO(file.read(MAX_PICKLE_BYTES))

    def storage(pickle_id: Any) -> Callable[..., None]:
        return lambda *arguments: None

    first = run_pickle(path, data, storage, lambda *arguments: None, _STORAGES)
    if first == _LEGACY_MAGIC:
        for _ in range(3):  # protocol number, system description, the object itself
            run_pickle(path, data, storage, lambda *arguments: None, _STORAGES)
        raise DarkroomError(f"{path} is in the file format of PyTorch before 1.6; save it again with a newer torch")
    raise DarkroomError(f"{path} is a bare pickle, not a torch checkpoint; save the weights as safetensors")


class _TorchZip:
    """`data.pkl` plus one uncompressed entry per storage."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, file: io.BufferedReader, size: int) -> None:
        self.path, self.archive, self.file, self.size = path, archive, file, size
        self.sizes: dict[str, int] = {}  # bytes of each storage that the pickle names
        self.kinds: dict[str, str] = {}
        self.storages: dict[str, Tensor] = {}
        self.bytes_named = 0
        names = archive.namelist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise DarkroomError(f"{path} is a zip file but not a torch checkpoint (it needs exactly one data.pkl)")
        self.pickle = pickles[0]
        self.prefix = self.pickle.removesuffix("data.pkl")
        if f"{self.prefix}constants.pkl" in names:
            raise DarkroomError(f"{path} is a TorchScript program, not a checkpoint; save its state_dict instead")

    def load(self, leaf: Callable[[StoredTensor], Any]) -> Any:
        """The object, with `leaf(stored)` for each tensor."""
        byte_order = f"{self.prefix}byteorder"
        if byte_order in self.archive.namelist() and self._entry(byte_order) != b"little":
            raise DarkroomError(f"{self.path} was written on a big-endian machine, which is not supported")
        if self.archive.getinfo(self.pickle).file_size > MAX_PICKLE_BYTES:
            raise DarkroomError(f"{self.path} holds a pickle of more than {MAX_PICKLE_BYTES >> 20} MB; not a model")

        def rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
            return leaf(self._stored(storage, offset, shape, stride))

        return run_pickle(self.path, io.BytesIO(self._entry(self.pickle)), self._storage, rebuild, _STORAGES)

    def _info(self, name: str) -> zipfile.ZipInfo:
        """The directory entry of a file in the archive, checked."""
        info = self.archive.getinfo(name)
        # torch never compresses: a compressed or overlapping entry is how a small file becomes a memory bomb.
        self.bytes_named += info.file_size
        is_plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not is_plain or info.flag_bits & 1 or self.bytes_named > self.size:
            raise DarkroomError(
                f"{self.path} holds compressed, encrypted or overlapping entries, unlike those of torch"
            )
        return info

    def _entry(self, name: str) -> bytes:
        info = self._info(name)
        self.file.seek(self._begin(info))
        content = self.file.read(info.file_size)
        if zlib.crc32(content) != info.CRC:
            raise EOFError(f"{name} has another checksum")
        return content

    def _begin(self, info: zipfile.ZipInfo) -> int:
        """Where the content of an entry begins in the file, which holds all of it."""
        self.file.seek(info.header_offset)
        header = self.file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise EOFError(f"{info.filename} has no header")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        begin: int = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if begin + info.file_size > self.size:
            raise EOFError(f"{info.filename} ends early")
        return begin

    def _storage(self, pickle_id: Any) -> str:
        """('storage', type, key, location, number of elements) -> the key; size and type are noted."""
        match pickle_id:
            case ("storage", Global(module="torch", name=kind), str(key), _, int(_)) if kind in _STORAGES:
                pass
            case _:
                raise DarkroomError(f"{self.path} refers to something that is not a tensor storage; not a model")
        if key not in self.sizes:
            try:
                self.sizes[key] = self._info(self._name(key)).file_size
            except KeyError:
                raise DarkroomError(f"{self.path} is damaged: storage {key} is missing") from None
            self.kinds[key] = _STORAGES[kind]
        if self.kinds[key] != _STORAGES[kind]:
            raise DarkroomError(f"{self.path} is damaged: storage {key} has two types")
        return key

    def _stored(self, key: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
        """torch._utils._rebuild_tensor_v2: a strided view that must lie inside its storage."""
        if not (
            isinstance(key, str)
            and key in self.sizes
            and isinstance(shape, tuple)
            and isinstance(stride, tuple)
            and len(shape) == len(stride) <= MAX_DIMENSIONS
            and natural_numbers([offset, *shape, *stride])
        ):
            raise DarkroomError(f"{self.path} is damaged: a tensor has no valid shape")
        kind = self.kinds[key]
        length, rest = divmod(self.sizes[key], _ITEM_BYTES[kind])
        if rest:
            raise DarkroomError(f"{self.path} is damaged: a storage ends within an element")
        numel = math.prod(shape)
        last = offset + _last(shape, stride) if numel else 0
        if numel > length or last >= max(length, 1) or (numel == 0 and max(shape, default=0) >= 2**62):
            raise DarkroomError(f"{self.path} is damaged: a tensor of shape {shape} lies outside its storage")
        return StoredTensor(key, kind, shape, stride, offset)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The numbers. Tensors of one storage share it."""
        if stored.storage not in self.storages:
            name = self._name(stored.storage)
            self.storages[stored.storage] = self._read(name, 0, self.archive.getinfo(name).file_size)
        return _strided(self.storages[stored.storage], stored, stored.offset)

    def alone(self, stored: StoredTensor) -> Tensor:
        """The numbers, in memory of their own, whatever else lies in the same storage."""
        item = _ITEM_BYTES[stored.dtype]
        count = 1 + _last(stored.shape, stored.stride) if math.prod(stored.shape) else 0
        return _strided(self._read(self._name(stored.storage), stored.offset * item, count * item), stored, 0)

    def place(self, stored: StoredTensor) -> tuple[int, int]:
        """Where a tensor begins, for reading in the order of the file."""
        return self.archive.getinfo(self._name(stored.storage)).header_offset, stored.offset

    def _name(self, storage: str) -> str:
        return f"{self.prefix}data/{storage}"

    def _read(self, name: str, start: int, count: int) -> Tensor:
        """(count,) uint8: a part of a storage, read into its final place; the checksum of a whole one is compared."""
        info = self.archive.getinfo(name)
        begin = self._begin(info)  # checked before memory is taken
        checksum = 0

        def add(part: memoryview) -> None:
            nonlocal checksum
            checksum = zlib.crc32(part, checksum)

        is_whole = count == info.file_size
        raw = read_bytes(self.file, begin + start, count, *([add] if is_whole else []))
        if raw is None:
            raise EOFError(f"{name} ends early")
        if is_whole and checksum != info.CRC:
            raise EOFError(f"{name} has another checksum")
        return raw


def _last(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How far behind the first element the last one lies; the shape has no 0."""
    return sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _strided(raw: Tensor, stored: StoredTensor, offset: int) -> Tensor:
    flat = as_dtype(raw, stored.dtype)
    if not math.prod(stored.shape):
        return flat.new_empty(stored.shape)
    return flat.as_strided(stored.shape, stored.stride, offset)


def stored_table(content: Any) -> dict[str, StoredTensor]:
    """The tensors of what `read_structure` gives by name: of its `state_dict` if it has one, else its own entries."""
    table = content.get("state_dict", content) if isinstance(content, dict) else {}
    entries = table.items() if isinstance(table, dict) else ()
    return {str(name): value for name, value in entries if isinstance(value, StoredTensor)}
