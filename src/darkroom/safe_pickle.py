"""Pickled checkpoints read as data: an interpreter of the pickle format that can neither import nor call.

torch writes a zip with `data.pkl` (the structure) and one uncompressed entry per storage (the numbers). A pickle is
a small program; here its instructions are carried out on plain containers and tensors only, and a name that tensors and
dictionaries do not need is refused and shown.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import DarkroomError
from darkroom.safe_files import natural_numbers, open_for_reading

if TYPE_CHECKING:
    from torch import Tensor, dtype

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
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class _Global:
    """A name that a pickle refers to. It is only ever compared, never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def read_checkpoint(path: Path | str) -> Any:
    """The object in a torch zip file (.ckpt, .pt, .pth, .bin): nested plain containers of tensors, on the CPU.

    Nothing in the file is executed: a name other than those that tensors and dictionaries need is refused and shown.
    """
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
                return _TorchZip(path, archive, size).load()
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
        self.storages: dict[str, tuple[Tensor, dtype]] = {}
        self.bytes_read = 0
        names = archive.namelist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise DarkroomError(f"{path} is a zip file but not a torch checkpoint (it needs exactly one data.pkl)")
        self.pickle = pickles[0]
        self.prefix = self.pickle.removesuffix("data.pkl")
        if f"{self.prefix}constants.pkl" in names:
            raise DarkroomError(f"{path} is a TorchScript program, not a checkpoint; save its state_dict instead")

    def load(self) -> Any:
        byte_order = f"{self.prefix}byteorder"
        if byte_order in self.archive.namelist() and self._entry(byte_order) != b"little":
            raise DarkroomError(f"{self.path} was written on a big-endian machine, which is not supported")
        if self.archive.getinfo(self.pickle).file_size > MAX_PICKLE_BYTES:
            raise DarkroomError(f"{self.path} holds a pickle of more than {MAX_PICKLE_BYTES >> 20} MB; not a model")
        return _interpret(self.path, io.BytesIO(self._entry(self.pickle)), self._storage, self._rebuild)

    def _entry(self, name: str) -> bytes:
        info = self.archive.getinfo(name)
        # torch never compresses: a compressed or overlapping entry is how a small file becomes a memory bomb.
        self.bytes_read += info.file_size
        if info.compress_type != zipfile.ZIP_STORED or self.bytes_read > self.size:
            raise DarkroomError(f"{self.path} holds compressed or overlapping entries, which torch never writes")
        return self.archive.read(info)

    def _storage(self, pickle_id: Any) -> tuple[Tensor, dtype]:
        """('storage', type, key, location, number of elements) -> flat bytes (n,) and the dtype to see them in."""
        import torch

        match pickle_id:
            case ("storage", _Global(module="torch", name=kind), str(key), _, int(_)) if kind in _STORAGES:
                pass
            case _:
                raise DarkroomError(f"{self.path} refers to something that is not a tensor storage; not a model")
        if key not in self.storages:
            try:
                data = self._entry(f"{self.prefix}data/{key}")
            except KeyError:
                raise DarkroomError(f"{self.path} is damaged: storage {key} is missing") from None
            self.storages[key] = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8),
                getattr(torch, _STORAGES[kind]),
            )
        raw, dtype = self.storages[key]
        if dtype != getattr(torch, _STORAGES[kind]):
            raise DarkroomError(f"{self.path} is damaged: storage {key} has two types")
        return raw, dtype

    def _rebuild(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
        """torch._utils._rebuild_tensor_v2: a strided view that must lie inside its storage."""
        import torch

        if not (
            isinstance(storage, tuple)
            and len(storage) == 2
            and isinstance(storage[0], torch.Tensor)
            and isinstance(shape, tuple)
            and isinstance(stride, tuple)
            and len(shape) == len(stride) <= 8
            and natural_numbers([offset, *shape, *stride])
        ):
            raise DarkroomError(f"{self.path} is damaged: a tensor has no valid shape")
        raw, dtype = storage
        if raw.numel() % dtype.itemsize:
            raise DarkroomError(f"{self.path} is damaged: a storage ends within an element")
        flat = (raw != 0) if dtype == torch.bool else raw.view(dtype)
        numel = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if numel else 0
        if numel > flat.numel() or last >= max(flat.numel(), 1):
            raise DarkroomError(f"{self.path} is damaged: a tensor of shape {shape} lies outside its storage")
        tensor: Tensor = flat.as_strided(shape, stride, offset) if numel else flat.new_empty(shape)
        return tensor


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
        if str(reference) in callables or (module == "torch" and name in _STORAGES):
            return reference
        raise DarkroomError(
            f"{path} is refused: its pickle wants to import {reference}, which could run code; "
            "ask for a safetensors file (nothing was run)"
        )

    def call(function: Any, arguments: Any) -> Any:
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
                    if not isinstance(stack[-1], OrderedDict):
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


def tensor_table(content: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: its `state_dict` if it has one, else its own entries."""
    import torch

    table = content.get("state_dict", content) if isinstance(content, dict) else {}
    items = table.items() if isinstance(table, dict) else ()
    return {str(name): value for name, value in items if isinstance(value, torch.Tensor)}
