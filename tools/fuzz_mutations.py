"""Damaged and hostile copies of weight files, configs and model folders, for `fuzz_checkpoints.py`.

Every change is drawn from one `random.Random`, so that a file is known by the name of its seed and a number. Changes go
along the structure of a format (an entry of a header, an instruction of a pickle, a value of a config) as often as
through its bytes: what only flips bytes is mostly stopped by the first check.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

MOST_BYTES = 128 * 2**20  # of a file whose tensors grew
NUMBERS = (0, 1, -1, 2, 3, 7, 8, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, 10**30)
TEXTS = (
    *("", " ", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\nb", "\x00", "\x1b[2J", "\ud800", "x" * 5000, "é"),
    *("NaN", "float32", "os.system", "__class__", "0", "-1", "99999999999999999999"),
)


def changed(data: bytes, name: str, rng: Random) -> bytes:
    """A changed copy of a file of that name; never the same bytes."""
    kinds: list[Callable[[bytes, Random], bytes]] = [_bytes]
    if name.endswith(".safetensors"):
        kinds += [_header, _header, _tensors]
    elif data[:2] == b"PK":
        kinds += [_program, _program, _zip]
    elif name.endswith(".json"):
        kinds += [_json, _json, _json, _json]
    elif data[:1] == b"\x80":
        kinds += [_bare_program]
    while True:
        result = rng.choice(kinds)(data, rng)
        if result != data:
            return result


# --------------------------------------------------------------------------------------------------------------- bytes


def _bytes(data: bytes, rng: Random) -> bytes:
    """Cut, longer, overwritten, shifted, or somewhere other bytes; damage near both ends, where structure is."""
    out = bytearray(data)

    def place() -> int:
        near = rng.choice((len(out), 64, 4096))
        offset = rng.randrange(max(1, min(near, len(out))))
        return offset if rng.random() < 0.5 else max(0, len(out) - 1 - offset)

    kind = rng.randrange(7)
    if kind == 0:
        return bytes(out[: place()])
    if kind == 1:
        return bytes(out) + rng.randbytes(rng.choice((1, 8, 1000)))
    if kind == 2 and len(out) >= 8:
        struct.pack_into("<Q", out, min(place(), len(out) - 8), rng.choice(NUMBERS) % 2**64)
    elif kind == 3:
        at = place()
        del out[at : at + rng.choice((1, 4, 100))]
    elif kind == 4:
        at = place()
        out[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
    elif out:
        for _ in range(rng.choice((1, 1, 3, 20))):
            out[place()] = rng.randrange(256)
    return bytes(out)


# ---------------------------------------------------------------------------------------------------------------- JSON


def _json(data: bytes, rng: Random) -> bytes:
    """One to three values, keys or whole branches changed; sometimes text that no `json.dumps` writes."""
    kind = rng.randrange(12)
    if kind == 0:
        return b"[" * 200_000
    if kind == 1:
        return b'{"a":[' + b"[]," * rng.choice((1000, 3_000_000)) + b"1]}"
    if kind == 2:
        return data.replace(b":", b":1" + b"0" * 5000 + b"," + b'"more":', 1)
    if kind == 3:
        return data.replace(b"{", b'{"kind":1,"kind":2,', 1)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = changed_value(value, rng)
    return json.dumps(value).encode()


def changed_value(value: Any, rng: Random) -> Any:
    """A copy of a JSON value with one change somewhere in it."""
    containers: list[Any] = []

    def walk(node: Any) -> None:
        if isinstance(node, (dict, list)) and node:
            containers.append(node)
            for child in node.values() if isinstance(node, dict) else node:
                walk(child)

    value = json.loads(json.dumps(value))
    walk(value)
    if not containers:
        return _anything(rng)
    node = rng.choice(containers)
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[_changed_name(key, rng)] = node.pop(key)
    elif kind == 2:
        other = rng.choice(containers)
        node[key] = json.loads(json.dumps(other))
    elif kind == 3 and rng.random() < 0.5:
        node[key] = _nested(node[key], rng)
    elif kind == 3 and isinstance(node, list):
        node.extend(node * rng.choice((1, 10, 1000)))
    elif isinstance(node[key], (int, float)) and rng.random() < 0.6:
        node[key] = rng.choice(
            (rng.choice(NUMBERS), -node[key], node[key] * 2, node[key] + 1, 0.5, float("nan"), 1e308)
        )
    else:
        node[key] = _anything(rng)
    return value


def _nested(value: Any, rng: Random) -> Any:
    """The value deep inside of lists and tables."""
    for _ in range(rng.choice((1, 3, 30, 300))):
        value = [value] if rng.random() < 0.5 else {rng.choice(("kind", "network", "encoders", "a")): value}
    return value


def _anything(rng: Random) -> Any:
    simple = (None, True, False, 0.5, -0.0, 1e308, float("inf"), float("nan"), [], {}, [[]], [None], {"": {}})
    return rng.choice((*simple, rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(TEXTS)))


def _changed_name(name: str, rng: Random) -> str:
    """Of a tensor or a setting: another part, number, prefix or suffix."""
    parts = name.split(".")
    at = rng.randrange(len(parts))
    kind = rng.randrange(7)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts[at] = str(rng.choice(NUMBERS))
    elif kind == 2:
        parts[at] = rng.choice(TEXTS)
    elif kind == 3:
        parts.insert(at, rng.choice(("model", "0", "1", "first_stage_model", "model_ema", "weight", "down", "attn")))
    elif kind == 4:
        parts[at] = parts[at][::-1]
    elif kind == 5:
        parts[at] = parts[at].replace("0", rng.choice(("1", "9", "4000000000", "-1", "٣")))
    else:
        parts[at] += rng.choice(("s", "0", "_", " ", ".weight"))
    return ".".join(parts)


# ---------------------------------------------------------------------------------------------------------- safetensors


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(header: Any, numbers: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + numbers


def _header(data: bytes, rng: Random) -> bytes:
    """A header that lies: about its length, about shapes, places and dtypes, or in its text."""
    header, numbers = _split(data)
    names = [name for name in header if name != "__metadata__"]
    notes = {key: text for key, text in header.get("__metadata__", {}).items() if text[:1] in ("{", "[")}
    if notes and rng.random() < 0.4:
        key = rng.choice(list(notes))
        header["__metadata__"][key] = _json(notes[key].encode(), rng).decode()
        return _join(header, numbers)
    kind = rng.randrange(9)
    if kind == 0:
        return _join(header, numbers, rng.choice(NUMBERS))
    if kind == 1:
        return _join(_json(json.dumps(header).encode(), rng), numbers)
    if kind == 2:
        return _join(changed_value(header, rng), numbers)
    name = rng.choice(names)
    entry = header[name]
    if kind == 3:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "", None))
    elif kind == 4:
        entry["shape"] = [rng.choice((*NUMBERS, *entry["shape"])) for _ in range(rng.randrange(6))]
    elif kind == 5:
        entry["data_offsets"] = [rng.choice((*NUMBERS, *entry["data_offsets"])) for _ in range(2)]
    elif kind == 6:
        other = rng.choice(names)
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 7:
        header[_changed_name(name, rng)] = header.pop(name)
    else:
        entry["shape"] = rng.sample(entry["shape"], len(entry["shape"])) + [1] * rng.randrange(3)
    return _join(header, numbers)


def _tensors(data: bytes, rng: Random) -> bytes:
    """A valid file of other tensors: renamed, missing, doubled, of another shape or dtype; what is more is zeros."""
    header, numbers = _split(data)
    metadata = header.pop("__metadata__", {})
    table = {name: [entry["dtype"], entry["shape"]] for name, entry in header.items()}
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(list(table))
        dtype, shape = table[name]
        kind = rng.randrange(6)
        if kind == 0 and len(table) > 1:
            del table[name]
        elif kind == 1:
            table[_changed_name(name, rng)] = table.pop(name)
        elif kind == 2:
            table[_changed_name(name, rng)] = [dtype, shape]
        elif kind == 3:
            table[name] = [rng.choice(("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E5M2")), shape]
        else:
            sizes = list(shape)
            if sizes and kind == 4:
                at = rng.randrange(len(sizes))
                sizes[at] = rng.choice((0, 1, 2, 3, 5, sizes[at] + 1, sizes[at] * 2, sizes[at] * 1000))
            else:
                sizes = rng.choice((sizes[:-1], [*sizes, 1], [1, *sizes], sizes[::-1], []))
            table[name] = [dtype, sizes]
    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in table.items():
        count = width.get(dtype, 1)
        for size in shape:
            count *= size
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    if end > MOST_BYTES:
        return _join(entries, numbers)  # a short file, that is
    return _join(entries, (numbers + bytes(max(0, end - len(numbers))))[:end])


# -------------------------------------------------------------------------------------------------------------- pickles

# Programs that run code where the reader carries out what they say.
MARK = "darkroom_fuzz_was_here"
EXPLOITS = (
    b"cos\nsystem\n(X%btR0" % (struct.pack("<I", 11 + len(MARK)) + b"touch /tmp/" + MARK.encode()),
    b"cbuiltins\nexec\n(X\x01\0\0\0" + b"1tR0",
    b"cfuzz_checkpoints\nran\n)R0",
    b"cbuiltins\neval\n0",
    b"ctorch.hub\nload\n)R0",
    b"ctorch\nload\n0",
    b"ctorch.storage\n_load_from_bytes\n(B\4\0\0\0PK\3\4tR0",
    b"cnumpy.core.multiarray\n_reconstruct\n0",
    b"X\2\0\0\0osX\6\0\0\0system\x930",
    b"(ifuzz_checkpoints\nran\n0",
    b"\x82\1",
    b"cfuzz_checkpoints\nRan\n)\x81}b0",
    b"ctorch._utils\n_rebuild_tensor_v3\n0",
    b"cnumpy\ndtype\n(X\2\0\0\0O8tR0",
)
VALUES = (
    *(b"N", b"]", b"}", b")", b"K\0", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\0", b"X\1\0\0\0a"),
    *(b"G\x7f\xf0" + bytes(6), b"(", b"0", b"2", b"t", b"R", b"Q", b"h\0", b"q\0", b"e", b"s", b"u", b"\x85", b"\x86"),
    *(b"b", b"."),
)


def changed_program(program: bytes, rng: Random) -> bytes:
    """A pickle with instructions taken out, doubled, exchanged, inserted, or with other arguments."""
    places = [place for _, _, place in pickletools.genops(program) if place is not None]
    pieces = [program[a:b] for a, b in zip(places, [*places[1:], len(program)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(pieces))
        kind = rng.randrange(8)
        if kind == 0:
            del pieces[at]
        elif kind == 1:
            pieces.insert(at, pieces[rng.randrange(len(pieces))])
        elif kind == 2:
            other = rng.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif kind == 3:
            pieces.insert(max(1, at), rng.choice(EXPLOITS))
        elif kind == 4:
            pieces[at] = rng.choice(VALUES)
        elif kind == 5:
            pieces.insert(at, rng.choice(VALUES) * rng.choice((1, 2, 100, 100_000, 1_500_000)))
        elif kind == 6 and len(pieces[at]) > 1:
            piece = bytearray(pieces[at])
            piece[rng.randrange(1, len(piece))] = rng.randrange(256)
            pieces[at] = bytes(piece)
        else:
            numbers = [i for i, piece in enumerate(pieces) if piece[:1] in b"KMJ"]
            if numbers:
                wanted = rng.choice(NUMBERS)
                pieces[rng.choice(numbers)] = b"\x8a\x10" + (wanted % 2**100).to_bytes(16, "little")
        if not pieces:
            return b""
    return b"".join(pieces)


def _bare_program(data: bytes, rng: Random) -> bytes:
    return changed_program(data, rng)


def _program(data: bytes, rng: Random) -> bytes:
    """The same archive around another program."""
    entries = _entries(data)
    (name,) = (name for name in entries if name.endswith("/data.pkl"))
    entries[name] = changed_program(entries[name], rng)
    return _archive(list(entries.items()), zipfile.ZIP_STORED)


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(entries: list[tuple[str, bytes]], compression: int) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w", compression) as archive:  # of equal names
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def _zip(data: bytes, rng: Random) -> bytes:
    """Entries missing, doubled, shorter, longer, renamed, compressed; records of the archive that lie."""
    entries = list(_entries(data).items())
    at = rng.randrange(len(entries))
    name, content = entries[at]
    kind = rng.randrange(9)
    compression = zipfile.ZIP_STORED
    if kind == 0:
        del entries[at]
    elif kind == 1:
        entries[at] = name, content[: rng.randrange(len(content) + 1)]
    elif kind == 2:
        entries[at] = name, content + rng.randbytes(rng.choice((1, 4, 1000)))
    elif kind == 3:
        entries[at] = _changed_name(name, rng).replace("\0", "0").encode("utf-8", "replace").decode() or "x", content
    elif kind == 4:
        compression = zipfile.ZIP_DEFLATED
        entries[at] = name, content + bytes(rng.choice((0, 10_000_000)))
    elif kind == 5:
        extra = rng.choice(("constants.pkl", "byteorder", "data.pkl", "x/data.pkl"))
        entries.append((name.split("/")[0] + "/" + extra, b"big"))
    elif kind == 6:
        entries += [(f"{i}/{'x' * 60_000}", b"") for i in range(rng.choice((3, 100)))]
    out = bytearray(_archive(entries, compression))
    if kind >= 7:  # a field of the table, of an entry's header, or of the end of the archive
        signature, size = rng.choice(((b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22), (b"PK\1\2", 46)))
        places = [i for i in range(len(out) - size) if out[i : i + 4] == signature] or [len(out) - 22]
        place = rng.choice(places) + rng.randrange(4, size - 3)
        struct.pack_into("<I", out, place, rng.choice((*NUMBERS, rng.randrange(2**32))) % 2**32)
    return bytes(out)


# -------------------------------------------------------------------------------------------------------------- folders


def change_folder(folder: Path, rng: Random) -> str:
    """Change one file of a folder in place; says which and how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    configs = [path for path in files if path.suffix == ".json"]
    path = rng.choice(configs if configs and rng.random() < 0.6 else files)
    name = str(path.relative_to(folder))
    kind = rng.randrange(24)
    if kind == 0:
        path.unlink()
        return f"{name} missing"
    if kind == 1:
        other = rng.choice(files)
        content = other.read_bytes()
        path.write_bytes(content if other != path else b"")
        return f"{name} is {other.name}"
    if kind == 2:
        path.unlink()
        special = rng.choice(("folder", "loop", "pipe", "zeros"))
        if special == "folder":
            path.mkdir()
        elif special == "loop":
            path.symlink_to(path.name)
        elif special == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        return f"{name} is a {special}"
    path.write_bytes(changed(path.read_bytes(), path.name, rng))
    return f"{name} changed"


def make_case(seed: Path, place: Path, rng: Random) -> str:
    """A changed copy of a seed (a file or a folder) at `place`; says what was changed."""
    if seed.is_dir():
        shutil.copytree(seed, place)
        return change_folder(place, rng)
    place.write_bytes(changed(seed.read_bytes(), seed.name, rng))
    return f"{seed.name} changed"
