"""The pickle format read as data: an interpreter that can neither import nor call.

A pickle is a small program. Its instructions are carried out on plain containers; the few functions that tensors need
are named in a closed list, and any other name is refused and shown. Time and memory are bounded by the number of
instructions, since one byte of a program may become a hundred bytes of objects.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkroom.errors import DarkroomError

# Stable Diffusion's 4 GB file has a pickle of 1 MB and fewer than 100,000 instructions; these only stop absurd ones.
MAX_PICKLE_BYTES = 32 * 2**20
MAX_INSTRUCTIONS = 300_000

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
class Global:
    """A name that a pickle refers to. It is only ever compared, never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _SteppedOver:
    """Stands where an object of a training program's bookkeeping was."""


def run_pickle(
    path: Path,
    data: io.BytesIO,
    storage: Callable[[Any], Any],
    rebuild: Callable[..., Any],
    storages: Collection[str],
) -> Any:
    """Run one pickle as data. The standard library's reader calls whatever a file names; this one has a closed list.

    storage:  gives what a persistent id stands for
    rebuild:  stands for `torch._utils._rebuild_tensor_v2`
    storages: the names in `torch` that may be referred to
    """

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

    references: dict[tuple[str, str], Global] = {}

    def refer(module: Any, name: Any) -> Global:
        # Before anything is done with them: the hash of a nest of a million tuples overflows the C stack.
        if not (type(module) is str and type(name) is str):
            raise damaged("a reference whose name is not a text")
        if (module, name) in references:
            return references[module, name]
        reference = Global(module, name)
        known = str(reference) in callables or str(reference) in _BOOKKEEPING
        if known or (module == "torch" and name in storages):
            return references.setdefault((module, name), reference)
        raise DarkroomError(
            f"{path} is refused: its pickle wants to import {reference}, which could run code; "
            "ask for a safetensors file (nothing was run)"
        )

    def call(function: Any, arguments: Any) -> Any:
        if isinstance(function, Global) and str(function) in _BOOKKEEPING:
            return _SteppedOver()
        if not (isinstance(function, Global) and str(function) in callables and isinstance(arguments, tuple)):
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
            if isinstance(key, Global):  # Lightning's callbacks are listed by class
                key = str(key)
            # Only keys whose hash is computed without recursion: a nest of a million tuples would overflow the C stack.
            if not isinstance(key, str | int | float | bytes | None):
                raise damaged("a dictionary key that is not a name or a number")
            # Python prints no numbers of thousands of digits, and many that differ by 2**61 - 1 have one hash.
            if isinstance(key, int) and not -(2**63) <= key < 2**63:
                raise damaged("a dictionary key that is too large a number")
            target[key] = value

    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_INSTRUCTIONS:
                raise damaged(f"more than {MAX_INSTRUCTIONS:,} instructions")
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
                    size = int(opcode.name[-1])
                    if len(stack) < size:
                        raise damaged("its stack is empty")
                    stack[-size:] = [tuple(stack[-size:])]
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
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, RecursionError) as error:
        raise damaged(error) from None
    raise damaged("it has no end")


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("values appended outside a list")
    return value
