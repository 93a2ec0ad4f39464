"""Pickled checkpoints read as data: an interpreter of the pickle format that can neither import nor call.

torch writes a zip with `data.pkl` (the structure) and one uncompressed entry per storage (the numbers). A pickle is
a small program; here its instructions are carried out on plain containers and tensors only, and a name that tensors and
dictionaries do not need is refused and shown. Numbers can be left in the file until they are wanted.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import DarkroomError
from darkroom.safe_files import natural_numbers, open_for_reading

if TYPE_CHECKING:
    from torch import Tensor

# Stable Diffusion's 4 GB file has a pickle of 1 MB; the limit only stops absurd ones.
MAX_PICKLE_BYTES = 64 * 2**20

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

# What Lightning notes about its callbacks in official checkpoints. Such objects are stepped over: nothing is imported,
# called or kept of them.
_BOOKKEEPING = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


@dataclass(frozen=True)
class _Global:
    """A name that a pickle refers to. It is only ever compared, never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _SteppedOver:
    """Stands where an object of a training program's bookkeeping was."""


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
    return _open(path, lambda checkpoint: checkpoint.load(checkpoint.tensor))


def read_structure(path: Path | str) -> Any:
    """As `read_checkpoint`, with a `StoredTensor` in the place of every tensor: no numbers are read."""
    return _open(path, lambda checkpoint: checkpoint.load(lambda stored: stored))


def read_stored(path: Path | str, wanted: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """These tensors of a checkpoint; `wanted` comes from `read_structure` of the same file."""

    def read(checkpoint: _TorchZip) -> dict[str, Tensor]:
        return {name: checkpoint.tensor(stored) for name, stored in wanted.items()}

    result: dict[str, Tensor] = _open(path, read)
    return result


def _open(path: Path | str, read: Callable[[_TorchZip], Any]) -> Any:
    path = Path(path)
    with open_for_reading(path) as (file, size):
        if size == 0:
            raise DarkroomError(f"{path} is empty; copy or download it again")
        start = file.read(4)
        file.seek(0)
        if start[:2] != b"PK":
            if start[:1] in (b"\x80", b"(", b"c", b"}", b"]"):
                _refuse_plain_pickle(path, file)
            raise DarkroomError(f"{path} is not a checkpoint: neither a torch zip file nor a safetensors file")
        try:
            with zipfile.ZipFile(file) as archive:
                return read(_TorchZip(path, archive, size))
        except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
            raise DarkroomError(f"{path} is damaged or truncated ({error}); copy or download it again") from None


def _refuse_plain_pickle(path: Path, file: io.BufferedReader) -> None:
    """Pickles outside a torch zip hold no weights that we could read; the message names the code in them, if any."""
    data = io.BytesIO(file.read(MAX_PICKLE_BYTES))

    def storage(pickle_id: Any) -> Callable[..., None]:
        return lambda *arguments: None

    first = _interpret(path, data, storage, lambda *arguments: None)
    if first == _LEGACY_MAGIC:
        for _ in range(3):  # protocol number, system description, the object itself
            _interpret(path, data, storage, lambda *arguments: None)
        raise DarkroomError(f"{path} is in the file format of PyTorch before 1.6; save it again with a newer torch")
    raise DarkroomError(f"{path} is a bare pickle, not a torch checkpoint; save the weights as safetensors")


class _TorchZip:
    """`data.pkl` plus one uncompressed entry per storage."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, size: int) -> None:
        self.path, self.archive, self.size = path, archive, size
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

        return _interpret(self.path, io.BytesIO(self._entry(self.pickle)), self._storage, rebuild)

    def _info(self, name: str) -> zipfile.ZipInfo:
        """The directory entry of a file in the archive, checked."""
        info = self.archive.getinfo(name)
        # torch never compresses: a compressed or overlapping entry is how a small file becomes a memory bomb.
        self.bytes_named += info.file_size
        if info.compress_type != zipfile.ZIP_STORED or self.bytes_named > self.size:
            raise DarkroomError(f"{self.path} holds compressed or overlapping entries, which torch never writes")
        return info

    def _entry(self, name: str) -> bytes:
        return self.archive.read(self._info(name))

    def _storage(self, pickle_id: Any) -> str:
        """('storage', type, key, location, number of elements) -> the key; size and type are noted."""
        match pickle_id:
            case ("storage", _Global(module="torch", name=kind), str(key), _, int(_)) if kind in _STORAGES:
                pass
            case _:
                raise DarkroomError(f"{self.path} refers to something that is not a tensor storage; not a model")
        if key not in self.sizes:
            try:
                self.sizes[key] = self._info(f"{self.prefix}data/{key}").file_size
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
            and len(shape) == len(stride) <= 8
            and natural_numbers([offset, *shape, *stride])
        ):
            raise DarkroomError(f"{self.path} is damaged: a tensor has no valid shape")
        kind = self.kinds[key]
        length, rest = divmod(self.sizes[key], _ITEM_BYTES[kind])
        if rest:
            raise DarkroomError(f"{self.path} is damaged: a storage ends within an element")
        numel = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if numel else 0
        if numel > length or last >= max(length, 1) or (numel == 0 and max(shape, default=0) >= 2**62):
            raise DarkroomError(f"{self.path} is damaged: a tensor of shape {shape} lies outside its storage")
        return StoredTensor(key, kind, shape, stride, offset)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The numbers. Tensors of one storage share it."""
        import torch

        dtype = getattr(torch, stored.dtype)
        if stored.storage not in self.storages:
            self.storages[stored.storage] = self._read(f"{self.prefix}data/{stored.storage}")
        raw = self.storages[stored.storage]
        flat = (raw != 0) if dtype == torch.bool else raw.view(dtype)
        if not math.prod(stored.shape):
            return flat.new_empty(stored.shape)
        return flat.as_strided(stored.shape, stored.stride, stored.offset)

    def _read(self, name: str) -> Tensor:
        """(n,) uint8: a storage, read into its final place."""
        import torch

        info = self.archive.getinfo(name)
        raw = torch.empty(info.file_size, dtype=torch.uint8)
        view = raw.numpy().data
        with self.archive.open(info) as file:
            while view:
                done = file.readinto(view)  # type: ignore[attr-defined]
                if not done:
                    raise EOFError(f"{name} ends early")
                view = view[done:]
        return raw


def _interpret(
    path: Path,
    data: io.BytesIO,
    storage: Callable[[Any], Any],
    rebuild: Callable[..., Any],
) -> Any:
    """Run one pickle as data. The standard library's reader calls whatever a file names; this one has a closed list."""

    def damaged(problem: object) -> DarkroomError:
        return DarkroomError(f"{path} is damaged: its pickle cannot be read ({problem}); copy or download it again")

    def parameter(value: Any = None, *_: Any) -> Any:
        return value

    def ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
        if arguments:
            raise damaged("a dictionary with arguments")
        return OrderedDict()

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":  # how protocol 2 writes bytes
            raise damaged("bytes in an unknown form")
        return text.encode("latin1")

    callables: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_parameter": parameter,
        "collections.OrderedDict": ordered_dict,
        "_codecs.encode": encode,
    }

    def refer(module: Any, name: Any) -> _Global:
        reference = _Global(str(module), str(name))
        known = str(reference) in callables or str(reference) in _BOOKKEEPING
        if known or (module == "torch" and name in _STORAGES):
            return reference
        raise DarkroomError(
            f"{path} is refused: its pickle wants to import {reference}, which could run code; "
            "ask for a safetensors file (nothing was run)"
        )

    def call(function: Any, arguments: Any) -> Any:
        if isinstance(function, _Global) and str(function) in _BOOKKEEPING:
            return _SteppedOver()
        if not (isinstance(function, _Global) and str(function) in callables and isinstance(arguments, tuple)):
            raise damaged("it calls something that is not a function")
        try:
            return callables[str(function)](*arguments)
        except (TypeError, AttributeError):
            raise damaged(f"wrong arguments for {function}") from None

    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def items() -> list[Any]:
        """What was pushed since the last mark."""
        nonlocal stack
        pushed, stack = stack, marks.pop()
        return pushed

    def set_items(target: Any, pairs: list[Any]) -> None:
        if not isinstance(target, dict) or len(pairs) % 2:
            raise damaged("entries outside a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(key, _Global):  # Lightning's callbacks are listed by class
                key = str(key)
            # Only keys whose hash is computed without recursion: a nest of a million tuples would overflow the C stack.
            if not isinstance(key, str | int | float | bytes | None):
                raise damaged("a dictionary key that is not a name or a number")
            target[key] = value

    try:
        for opcode, argument, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "NONE":
                    stack.append(None)
                case "NEWTRUE":
                    stack.append(True)
                case "NEWFALSE":
                    stack.append(False)
                case (
                    "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                    | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE"
                    | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
                ):  # fmt: skip
                    stack.append(argument)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    pushed = items()
                    stack.append(tuple(pushed))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    if len(stack) < count:
                        raise damaged("its stack is empty")
                    stack[-count:] = [tuple(stack[-count:])]
                case "LIST":
                    pushed = items()
                    stack.append(pushed)
                case "DICT":
                    pushed = items()
                    stack.append({})
                    set_items(stack[-1], pushed)
                case "APPEND":
                    value = stack.pop()
                    _as_list(stack[-1]).append(value)
                case "APPENDS":
                    pushed = items()
                    _as_list(stack[-1]).extend(pushed)
                case "SETITEM":
                    pair = stack[-2:]
                    del stack[-2:]
                    set_items(stack[-1], pair)
                case "SETITEMS":
                    pushed = items()
                    set_items(stack[-1], pushed)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[int(argument or 0)] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[int(argument or 0)])
                case "GLOBAL":
                    stack.append(refer(*str(argument).split(" ", 1)))
                case "INST":
                    refer(*str(argument).split(" ", 1))
                    raise damaged("opcode INST")
                case "STACK_GLOBAL":
                    module, name = stack[-2:]
                    del stack[-2:]
                    stack.append(refer(module, name))
                case "REDUCE" | "NEWOBJ":
                    function, arguments = stack[-2:]
                    del stack[-2:]
                    stack.append(call(function, arguments))
                case "BINPERSID":
                    stack.append(storage(stack.pop()))
                case "BUILD":
                    # Attributes of a dictionary (a state_dict's `_metadata`) carry no weights and are dropped.
                    stack.pop()
                    if not isinstance(stack[-1], OrderedDict | _SteppedOver):
                        raise damaged("state for something that is not a dictionary")
                case other:
                    raise damaged(f"opcode {other}")
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        raise damaged(error) from None
    raise damaged("it has no end")


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("values appended outside a list")
    return value


def stored_table(content: Any) -> dict[str, StoredTensor]:
    """The tensors of what `read_structure` gives by name: of its `state_dict` if it has one, else its own entries."""
    table = content.get("state_dict", content) if isinstance(content, dict) else {}
    entries = table.items() if isinstance(table, dict) else ()
    return {str(name): value for name, value in entries if isinstance(value, StoredTensor)}
